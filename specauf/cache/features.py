"""How the target's features are stored, and how a sketch folds back into the drafter's `fc`. Pure numpy.

- bf16: x itself, two bytes a value.
- int8: x[t, tap, c] = code * row_scale[t, tap] * channel_scale[tap, c].
- sketch: y = P^T S^-1 x with P [F, r] orthonormal and S = diag(channel_scale); y[t, j] = code * row_scale[t].
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, Int8, UInt16

from specauf.cache.schema import FeatureKind


@dataclass(frozen=True)
class FeatureCodec:
    """How one cache stores features.

    Attributes:
        kind: `none`, `bf16`, `int8` or `sketch`.
        taps: taps whose outputs are concatenated.
        channel_scale: S, one positive number per channel; None for `none` and `bf16`.
        basis: P with orthonormal columns; None without a sketch.
    """

    kind: FeatureKind
    taps: int
    channel_scale: Float32[np.ndarray, " features"] | None = None
    basis: Float32[np.ndarray, "features rank"] | None = None

    def decode(self, codes: np.ndarray, row_scale: np.ndarray | None) -> Float32[np.ndarray, "tokens features"]:
        """Features of some tokens; of a sketch, its reconstruction S P y.

        Args:
            codes: stored integers, [tokens, features] or [tokens, rank].
            row_scale: stored scales, [tokens, taps] or [tokens]; None for bf16.
        """
        if self.kind == "bf16":
            return decode_bf16(codes)
        assert row_scale is not None
        assert self.channel_scale is not None
        if self.kind == "sketch":
            assert self.basis is not None
            y = decode_sketch(codes, row_scale)
            return (y @ self.basis.T) * self.channel_scale
        tokens = len(codes)
        scaled = codes.reshape(tokens, self.taps, -1).astype(np.float32)
        scaled *= row_scale.astype(np.float32)[:, :, None]
        flat = scaled.reshape(tokens, -1)
        flat *= self.channel_scale
        return flat


def decode_bf16(codes: UInt16[np.ndarray, "tokens features"]) -> Float32[np.ndarray, "tokens features"]:
    """bfloat16 bits as float32: they are its upper half."""
    bits = codes.astype(np.uint32)
    bits <<= 16  # in place: fresh memory for a second array costs many times the shift
    return bits.view(np.float32)


def decode_sketch(
    codes: Int8[np.ndarray, "tokens rank"], row_scale: Float[np.ndarray, " tokens"]
) -> Float32[np.ndarray, "tokens rank"]:
    """Sketch coordinates y."""
    y = codes.astype(np.float32)
    y *= row_scale.astype(np.float32)[:, None]
    return y


def fold_sketch(
    fc_r: Float[np.ndarray, "hidden rank"],
    basis: Float[np.ndarray, "features rank"],
    scale: Float[np.ndarray, " features"],
) -> Float[np.ndarray, "hidden features"]:
    """The `fc` over raw features that equals `fc_r` over the sketch: fc = fc_r P^T S^-1, so fc x = fc_r y.

    Computed in float64 and returned in the type of `fc_r`.
    """
    folded = fc_r.astype(np.float64) @ basis.astype(np.float64).T / scale.astype(np.float64)
    return folded.astype(fc_r.dtype)
