"""Storing the target's features: fitting scales and the sketch's basis on a sample, and encoding.

A few channels of a language model carry values hundreds of times the rest (massive activations), everywhere or at a
document's first token only. One scale per row would spend all codes on them, so every channel is first divided by its
own root mean square over the sample's ordinary tokens.
"""

import contextlib
import os
from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from specauf.cache.features import FeatureCodec
from specauf.cache.schema import FeatureKind
from specauf.errors import UserError
from specauf.linear import linear

_BF16_EXPONENT = 0x7F80  # all ones in NaN and Inf


class TooFewTokensError(UserError):
    """A sketch's rank is larger than its sample allows."""


def fit_features(sample: Float[Tensor, "tokens features"], kind: FeatureKind, taps: int, rank: int = 0) -> FeatureCodec:
    """Fit what a kind of storage needs on features of a sample of the corpus.

    Args:
        sample: features of some thousand tokens, taps concatenated.
        kind: `none` and `bf16` need no fit.
        taps: taps that are concatenated.
        rank: columns of the sketch's basis.

    Raises:
        TooFewTokensError: the sample is too small for the rank.
        UserError: it holds NaN or Inf.
    """
    if kind in ("none", "bf16"):
        return FeatureCodec(kind, taps)
    with _all_cores():
        return _fit(sample, kind, taps, rank)


@contextlib.contextmanager
def _all_cores() -> Iterator[None]:
    """As many threads as the machine has cores, however few this rank was given: sums depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _fit(sample: Float[Tensor, "tokens features"], kind: FeatureKind, taps: int, rank: int) -> FeatureCodec:
    _require_finite(bool(torch.isfinite(sample).all()))
    x = _without_sinks(sample.double(), taps)
    mean_square = x.square().mean(0)
    # A channel that is zero over the sample still needs a scale.
    scale = mean_square.clamp_min(1e-6 * mean_square.mean().clamp_min(1e-30)).sqrt().float()
    if kind == "int8":
        return FeatureCodec(kind, taps, scale.numpy())
    if not 1 <= rank <= min(x.shape):
        raise TooFewTokensError(
            f"sketch_rank is {rank}, {x.shape[0]} sample tokens of {x.shape[1]} features allow 1 to {min(x.shape)}"
        )
    z = x / scale.double()
    # The drafter norms what `fc` gives, so only a row's direction matters to it.
    z = z / z.norm(dim=-1, keepdim=True).clamp_min(1e-30)
    return FeatureCodec(kind, taps, scale.numpy(), principal(z, rank).float().contiguous().numpy())


def principal(z: Float[Tensor, "tokens features"], rank: int) -> Float[Tensor, "features rank"]:
    """Orthonormal columns along which the rows are longest, the longest first.

    Args:
        z: rows.
        rank: columns wanted, at most tokens and features.
    """
    if z.shape[0] >= z.shape[1]:
        return torch.linalg.eigh(z.T @ z).eigenvectors[:, -rank:].flip(-1)
    # The smaller of the two Gram matrices says the same: a large target has more features than the fit has tokens, and
    # the time grows with the third power.
    of_rows = torch.linalg.eigh(z @ z.T).eigenvectors[:, -rank:].flip(-1)
    return torch.linalg.qr(z.T @ of_rows).Q


def _without_sinks(x: Float[Tensor, "tokens features"], taps: int) -> Float[Tensor, "kept features"]:
    """Rows whose every tap is at most eight times longer than the median row's.

    The others are attention sinks (a document's first token, mostly): always the same vector, a hundred times longer.
    """
    length = x.reshape(len(x), taps, -1).norm(dim=-1)
    return x[(length <= 8 * length.median(0).values).all(1)]


class FeatureEncoder:
    """Makes the arrays that store features; the work is done where the target is, for a sketch of one is not small.

    Args:
        codec: how features are stored.
        device: where to compute.
    """

    def __init__(self, codec: FeatureCodec, device: torch.device | str = "cpu") -> None:
        self.codec, self.device = codec, device
        if codec.channel_scale is not None:
            self._scale = torch.from_numpy(codec.channel_scale).to(device)
        if codec.basis is not None:
            self._basis = torch.from_numpy(codec.basis).to(device).T

    def __call__(self, features: Float[Tensor, "tokens features"]) -> dict[str, np.ndarray]:
        """The arrays of some tokens, by field name.

        Raises:
            UserError: the features hold NaN or Inf.
        """
        codec = self.codec
        if codec.kind == "none":
            return {}
        if codec.kind == "bf16":
            bits = features.to(torch.bfloat16).contiguous().view(torch.int16).cpu().numpy().view(np.uint16)
            _require_finite(bool(((bits & _BF16_EXPONENT) != _BF16_EXPONENT).all()))
            return {"features": bits}
        scaled = features.to(self.device).float() / self._scale
        if codec.kind == "int8":
            codes, scale = _to_int8(scaled.reshape(len(scaled), codec.taps, -1))
            return {"features": codes.reshape(scaled.shape), "feature_scale": scale}
        codes, scale = _to_int8(linear(scaled, self._basis))
        return {"sketch": codes, "feature_scale": scale}


def encode_features(features: Float[Tensor, "tokens features"], codec: FeatureCodec) -> dict[str, np.ndarray]:
    """The arrays that store some tokens' features, by field name.

    Raises:
        UserError: the features hold NaN or Inf.
    """
    return FeatureEncoder(codec)(features)


def _to_int8(values: Float[Tensor, "... channels"]) -> tuple[np.ndarray, np.ndarray]:
    """Codes of -127 to 127 and the float32 scale of each row of the last axis.

    Raises:
        UserError: a value is NaN or Inf; products and maxima pass these on, so that the largest value tells.
    """
    scale = values.abs().amax(-1) / 127
    _require_finite(bool(torch.isfinite(scale).all()))
    scale = torch.where(scale > 0, scale, 1.0)
    return torch.round(values / scale[..., None]).to(torch.int8).cpu().numpy(), scale.cpu().numpy()


def _require_finite(finite: bool) -> None:
    if not finite:
        raise UserError("the target's features hold NaN or Inf: compute in float32, or check the weights")


def reconstruction_error(features: Float[Tensor, "tokens features"], codec: FeatureCodec) -> list[float]:
    """What storing costs, per tap: ||x - x'||^2 / ||x||^2 with every channel divided by its root mean square.

    Measured over ordinary tokens: without the division and with sinks, a few channels would be all that is measured.
    """
    x = _without_sinks(features.double(), codec.taps)
    fields = encode_features(x.float(), codec)
    codes = fields.get("features", fields.get("sketch"))
    if codes is None:
        return [1.0] * codec.taps
    again = torch.from_numpy(codec.decode(codes, fields.get("feature_scale"))).double()
    scale = x.square().mean(0).sqrt().clamp_min(1e-12)
    error, whole = (((v / scale).square()).reshape(len(x), codec.taps, -1).sum((0, 2)) for v in (x - again, x))
    return (error / whole).tolist()
