"""Accept-Until-Fail: train only the slots that verification would reach.

    m[k] = prod_{j<k} 1[argmax q_j = y_j]            k = 1..B-1, empty product = 1

so the accepted prefix *and the slot that fails* are inside, everything after is out. The weight is detached and taken
from the current drafter at every step. Source: Spec-AUF, arXiv 2607.01893 (Yang and Li, 2026). Leaving the failing slot
out is the one fatal mistake (tau 5.75 -> 3.11 in the ablation of VAT, arXiv 2608.30135): then nothing teaches the slot
that stops the block. That variant is here as `exclusive_cut`, for ablations only.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from specauf.errors import UserError
from specauf.objectives.evidence import Evidence, valid_prefix
from specauf.objectives.weighting import Weighting, exponential_decay


def accept_until_fail(
    correct: Bool[Tensor, "blocks slots"], valid: Bool[Tensor, "blocks slots"], dtype: torch.dtype | None = None
) -> Float[Tensor, "blocks slots"]:
    """AUF weights: 1 up to and including each block's first wrong slot, then 0.

    Args:
        correct: the drafter's greedy token equals the accepted one (c_j above).
        valid: the slot may be supervised; the first invalid slot ends the block.
        dtype: of the result; torch's default dtype when None.
    """
    reached = torch.cat([torch.ones_like(correct[:, :1]), correct[:, :-1]], dim=-1).cumprod(dim=-1).bool()
    return (valid_prefix(valid) & reached).to(dtype or torch.get_default_dtype())


def exclusive_cut(
    correct: Bool[Tensor, "blocks slots"], valid: Bool[Tensor, "blocks slots"], dtype: torch.dtype | None = None
) -> Float[Tensor, "blocks slots"]:
    """ABLATION, do not train with it: AUF without the failing slot, m[k] = prod_{j<=k} 1[argmax q_j = y_j]."""
    return (valid_prefix(valid) & correct.cumprod(dim=-1).bool()).to(dtype or torch.get_default_dtype())


def first_failure(correct: Bool[Tensor, "blocks slots"], valid: Bool[Tensor, "blocks slots"]) -> Int[Tensor, " blocks"]:
    """k* of each block: the first wrong slot, 1-based; slots + 1 when none is. Equals accepted + 1 = tau."""
    return (valid_prefix(valid) & correct).cumprod(dim=-1).sum(dim=-1) + 1


def soft_tail(
    correct: Bool[Tensor, "blocks slots"],
    valid: Bool[Tensor, "blocks slots"],
    gamma: float | int,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "blocks slots"]:
    """AUF with a decaying tail: 1 before the first wrong slot k*, exp(-(k - k*) / gamma) from it on.

    Source: the weights of VAT, arXiv 2608.30135. The failing slot itself has weight 1, as in AUF.
    """
    inside = accept_until_fail(correct, valid, dtype)
    slots = torch.arange(1, correct.shape[-1] + 1, device=correct.device, dtype=inside.dtype)
    return torch.exp(-(slots - first_failure(correct, valid)[:, None]).clamp_min(0) / gamma) * valid_prefix(valid)


class AcceptUntilFail(Weighting):
    """Accept-Until-Fail, Spec-AUF: weight 1 through the first failing slot, 0 after it.

    Args:
        decay_gamma: also multiply by exp(-(k-1)/decay_gamma); null for plain AUF. Inert on DFlash, a gain on Domino.
    """

    def __init__(self, decay_gamma: float | None = None):
        if decay_gamma is not None and decay_gamma <= 0:
            raise UserError(f"loss decay_gamma is {decay_gamma}: give slots > 0, or null for plain AUF")
        self.decay_gamma = decay_gamma

    def __call__(self, evidence: Evidence, step: int) -> Float[Tensor, "blocks slots"]:
        """See `accept_until_fail`."""
        weights = accept_until_fail(evidence.correct, evidence.valid, evidence.dtype)
        if self.decay_gamma is None:
            return weights
        return weights * exponential_decay(evidence.valid, self.decay_gamma, evidence.dtype)

    def stops_at_failure(self, step: int) -> bool:
        """Always: this is what makes AUF cheap."""
        return True


class ExclusiveCut(Weighting):
    """ABLATION: AUF without the failing slot. It collapses; it is here to show that it does."""

    def __call__(self, evidence: Evidence, step: int) -> Float[Tensor, "blocks slots"]:
        """See `exclusive_cut`."""
        return exclusive_cut(evidence.correct, evidence.valid, evidence.dtype)

    def stops_at_failure(self, step: int) -> bool:
        """Always."""
        return True


class SoftTail(Weighting):
    """AUF whose weight decays after the failing slot, where AUF cuts (VAT's weights).

    Args:
        tail_gamma: slots over which the weight falls to 1/e after the failing slot; towards 0 it becomes AUF.
    """

    def __init__(self, tail_gamma: float = 7.0):
        if tail_gamma <= 0:
            raise UserError(f"loss tail_gamma is {tail_gamma}: give slots > 0, or take auf, which has no tail")
        self.tail_gamma = tail_gamma

    def __call__(self, evidence: Evidence, step: int) -> Float[Tensor, "blocks slots"]:
        """See `soft_tail`."""
        return soft_tail(evidence.correct, evidence.valid, self.tail_gamma, evidence.dtype)
