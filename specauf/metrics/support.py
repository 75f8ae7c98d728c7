"""What a loss looked at, and how well the drafter did there; each denominator has its own name."""

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric

from specauf.metrics.emitted import UNITS, share_of
from specauf.objectives.objective import LossOutput


class _Share(Metric):
    full_state_update = False
    part: Tensor
    whole: Tensor
    units = 1

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        for name in ("part", "whole"):
            self.add_state(name, torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def _add(self, part: Tensor, whole: Tensor) -> None:
        self.part += part
        self.whole += whole

    def compute(self) -> Float[Tensor, ""]:
        """The share; 0 before the first slot."""
        return share_of(self.part, self.whole, self.units)


class TokenAccuracy(_Share):
    """Share of slots whose greedy token is the accepted one.

    `block` has the same denominator for every loss, so losses can be compared by it (and it misleads: decay scores
    higher than AUF and decodes worse). `support` counts only slots with weight: a loss's own, moving denominator.

    Args:
        where: block: all valid slots. support: slots that the loss counts.
        kwargs: of `torchmetrics.Metric`.
    """

    def __init__(self, where: Literal["block", "support"] = "block", **kwargs: Any):
        super().__init__(**kwargs)
        self.where = where

    def update(self, output: LossOutput) -> None:
        """Add the blocks of one loss.

        Raises:
            ValueError: `block`, but the loss skipped slots after the first failure.
        """
        if self.where == "support":
            support = output.weights > 0
            return self._add((output.correct & support).sum(), support.sum())
        if not torch.equal(output.seen, output.valid):
            raise ValueError("token accuracy of the whole block needs every slot: call block_loss(every_slot=True)")
        return self._add(output.correct.sum(), output.valid.sum())


class SupportRatio(_Share):
    """Share of valid slots that the loss counts: 1 for cross-entropy, near tau / (B-1) for AUF, rising in training."""

    def update(self, output: LossOutput) -> None:
        """Add the blocks of one loss."""
        self._add((output.weights > 0).sum(), output.valid.sum())


class AcceptanceProbability(_Share):
    """Mean alpha = sum_v min(p_v, q_v) over the slots seen, by the objective's bound for the sparse tail."""

    units = UNITS

    def update(self, output: LossOutput) -> None:
        """Add the blocks of one loss.

        Raises:
            ValueError: the batch carried no teacher.
        """
        if output.alpha is None:
            raise ValueError("alpha needs the target's log-probs in the batch")
        self._add((output.alpha.sum() * UNITS).round().long(), output.seen.sum())
