"""Which slots of a block count, and how much: the weightings that do not look at failures.

A weighting maps what is known of each slot to w[b, k] >= 0, detached, and 0 outside the block's valid prefix.
`auf.py` holds Accept-Until-Fail and its relatives, `dpace.py` D-PACE.
"""

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from specauf.errors import UserError
from specauf.objectives.evidence import Evidence, valid_prefix


def uniform(valid: Bool[Tensor, "blocks slots"], dtype: torch.dtype | None = None) -> Float[Tensor, "blocks slots"]:
    """w[k] = 1 on the valid prefix: plain cross-entropy over the whole block."""
    return valid_prefix(valid).to(dtype or torch.get_default_dtype())


def exponential_decay(
    valid: Bool[Tensor, "blocks slots"], gamma: float | int, dtype: torch.dtype | None = None
) -> Float[Tensor, "blocks slots"]:
    """w[k] = exp(-(k-1)/gamma), k = 1..B-1: DFlash's default (arXiv 2602.06036, Eq. 4).

    Args:
        valid: the slot may be supervised; the first invalid slot ends the block.
        gamma: in slots; the paper takes 7 for B=16, 5 for B=10, 4 for B=8.
        dtype: of the result; torch's default dtype when None.
    """
    weights = uniform(valid, dtype)
    slots = torch.arange(valid.shape[-1], device=valid.device, dtype=weights.dtype)
    return weights * torch.exp(-slots / gamma)


def survival(
    alpha: Float[Tensor, "blocks slots"], valid: Bool[Tensor, "blocks slots"]
) -> Float[Tensor, "blocks slots"]:
    """w[k] = prod_{j<k} alpha_j: the chance that sampled verification reaches slot k; AUF's soft counterpart.

    Args:
        alpha: sum_v min(p_v, q_v) of each slot, in 0..1.
        valid: the slot may be supervised; the first invalid slot ends the block.
    """
    alpha = alpha.detach()
    reached = torch.cat([torch.ones_like(alpha[:, :1]), alpha[:, :-1]], dim=-1).cumprod(dim=-1)
    return torch.where(valid_prefix(valid), reached, torch.zeros_like(reached))


class Weighting(ABC):
    """Weights of the slots of each block, from what is known of them."""

    needs_teacher: bool = False

    @abstractmethod
    def __call__(self, evidence: Evidence, step: int) -> Float[Tensor, "blocks slots"]:
        """Weights at optimizer step `step`: detached, 0 outside `evidence.valid`."""

    def stops_at_failure(self, step: int) -> bool:
        """Every slot after the first failure weighs 0, and a slot's weight depends on no later slot.

        `block_loss` then runs the LM head only on slots that are still alive.
        """
        return False


class Uniform(Weighting):
    """Every valid slot counts the same."""

    def __call__(self, evidence: Evidence, step: int) -> Float[Tensor, "blocks slots"]:
        """See `uniform`."""
        return uniform(evidence.valid, evidence.dtype)


class ExponentialDecay(Weighting):
    """Earlier slots count more: DFlash's default weighting.

    Args:
        gamma: slots over which the weight falls to 1/e. 7 for block size 16, 5 for 10, 4 for 8.
    """

    def __init__(self, gamma: float = 7.0):
        if gamma <= 0:
            raise UserError(f"loss gamma is {gamma}: give slots > 0, such as 7 for block size 16")
        self.gamma = gamma

    def __call__(self, evidence: Evidence, step: int) -> Float[Tensor, "blocks slots"]:
        """See `exponential_decay`."""
        return exponential_decay(evidence.valid, self.gamma, evidence.dtype)


class Survival(Weighting):
    """A slot counts as much as sampled verification is likely to reach it. Needs the target's log-probs."""

    needs_teacher = True

    def __call__(self, evidence: Evidence, step: int) -> Float[Tensor, "blocks slots"]:
        """See `survival`."""
        assert evidence.alpha is not None
        return survival(evidence.alpha, evidence.valid)


class WarmUp(Weighting):
    """One weighting at the start of training and another after it: a cold drafter gives AUF one slot a block.

    w = (1 - r) * before + r * after, r going from 0 to 1.

    Args:
        before: weighting at step 0.
        after: weighting from step `warmup_steps` on.
        warmup_steps: optimizer steps of the transition.
        schedule: r over the transition: linear, cosine, or switch (0 until the end, then 1).
    """

    def __init__(
        self,
        before: Weighting,
        after: Weighting,
        warmup_steps: int = 500,
        schedule: Literal["linear", "cosine", "switch"] = "linear",
    ):
        if warmup_steps < 1:
            raise UserError(f"loss warmup_steps is {warmup_steps}: give at least 1, or use the later weighting alone")
        self.before = before
        self.after = after
        self.warmup_steps = warmup_steps
        self.schedule = schedule
        self.needs_teacher = before.needs_teacher or after.needs_teacher

    def progress(self, step: int) -> float:
        """The ratio r at a step, 0..1."""
        done = min(1.0, step / self.warmup_steps)
        if self.schedule == "cosine":
            return (1 - math.cos(math.pi * done)) / 2
        return done if self.schedule == "linear" else float(done >= 1)

    def __call__(self, evidence: Evidence, step: int) -> Float[Tensor, "blocks slots"]:
        """The mixture at this step."""
        ratio = self.progress(step)
        if ratio == 0:
            return self.before(evidence, step)
        if ratio == 1:
            return self.after(evidence, step)
        return (1 - ratio) * self.before(evidence, step) + ratio * self.after(evidence, step)

    def stops_at_failure(self, step: int) -> bool:
        """Once the later weighting is alone, if it does."""
        ratio = self.progress(step)
        parts = [p for p, share in ((self.before, 1 - ratio), (self.after, ratio)) if share > 0]
        return all(part.stops_at_failure(step) for part in parts)
