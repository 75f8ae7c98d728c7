"""An objective: weighting x divergence, one frame for every loss of this package.

loss = sum_b sum_k w[b,k] * l[b,k] / sum_b sum_k w[b,k]                    (reduction "token")
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from specauf.data.batch import BlockTargets
from specauf.errors import UserError, unknown_name
from specauf.objectives.divergence import Divergence
from specauf.objectives.evidence import (
    DraftReading,
    Evidence,
    Teacher,
    acceptance_probability,
    read_logits,
    valid_prefix,
    zero_where_not,
)
from specauf.objectives.weighting import Weighting

Source = Literal["data", "teacher"]
Reduction = Literal["token", "block", "block_sum"]
AlphaBound = Literal["lower", "upper"]


@dataclass(frozen=True)
class LossOutput:
    """A loss before its division, and what the metrics need. All but `numerator` are detached.

    Attributes:
        numerator: weighted sum of divergences; differentiable.
        denominator: what to divide by, after adding both up over micro-batches and ranks.
        weights: w[b, k]; 0 outside `valid`.
        losses: l[b, k]; 0 where not `seen`.
        valid: each block's contiguous valid prefix.
        seen: the slot's logits were computed. A loss that stops at the first failure leaves later slots unseen.
        correct: the greedy draft token equals the accepted one (objective's `failure`); False where not seen.
        alpha: sum_v min(p_v, q_v), 0 where not seen; None when the batch carries no teacher.
        complete: every valid slot was seen, whatever the drafter said.
        confidence_error: how far the confidence is from what came; None where the drafter has none.
    """

    numerator: Float[Tensor, ""]
    denominator: Float[Tensor, ""]
    weights: Float[Tensor, "blocks slots"]
    losses: Float[Tensor, "blocks slots"]
    valid: Bool[Tensor, "blocks slots"]
    seen: Bool[Tensor, "blocks slots"]
    correct: Bool[Tensor, "blocks slots"]
    alpha: Float[Tensor, "blocks slots"] | None = None
    complete: bool = True
    confidence_error: Float[Tensor, "blocks slots"] | None = None

    def summary(self) -> dict[str, Tensor]:
        """Scalars to log: see `specauf.metrics` for the same over many batches.

        tau: 1 + accepted, mean over blocks with a valid slot. support_ratio: supported / valid slots.
        support_accuracy: correct / supported slots. token_accuracy: correct / valid slots, when `complete`.
        alpha: mean over seen slots. confidence_error: mean over supported slots.
        """
        support = self.weights > 0
        blocks = self.valid.any(-1)
        accepted = self.correct.cumprod(-1).sum(-1)
        found = {
            "tau": 1 + _ratio(accepted.sum(), blocks.sum()),
            "support_ratio": _ratio(support.sum(), self.valid.sum()),
            "support_accuracy": _ratio((self.correct & support).sum(), support.sum()),
        }
        if self.complete:
            found["token_accuracy"] = _ratio(self.correct.sum(), self.valid.sum())
        if self.alpha is not None:
            found["alpha"] = _ratio(self.alpha.sum(), self.seen.sum())
        if self.confidence_error is not None:
            found["confidence_error"] = _ratio((self.confidence_error * support).sum(), support.sum())
        return found


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    return part / whole.clamp_min(1)


class Objective:
    """A training objective, configured by one file of `configs/loss/`.

    Args:
        weighting: which slots count.
        divergence: how a slot's prediction is scored.
        labels: the token that cross-entropy wants: the data's, or the target's most probable one (`teacher`).
        failure: what a draft token must equal to be accepted: the data token, or the target's most probable one.
        reduction: token: divide by the sum of all weights. block: mean over blocks of each block's own weighted mean.
            block_sum: mean over blocks of each block's weighted sum.
        alpha_bound: bound that stands for the acceptance probability alpha under the sparse teacher.
    """

    def __init__(
        self,
        weighting: Weighting,
        divergence: Divergence,
        labels: Source = "data",
        failure: Source = "data",
        reduction: Reduction = "token",
        alpha_bound: AlphaBound = "lower",
    ):
        for field, value, known in (
            ("labels", labels, Source),
            ("failure", failure, Source),
            ("reduction", reduction, Reduction),
            ("alpha_bound", alpha_bound, AlphaBound),
        ):
            if value not in get_args(known):
                raise unknown_name(f"loss {field}", value, get_args(known))
        self.weighting = weighting
        self.divergence = divergence
        self.labels = labels
        self.failure = failure
        self.reduction = reduction
        self.alpha_bound = alpha_bound

    @property
    def needs_teacher(self) -> bool:
        """The batch must carry the target's sparse log-probs."""
        return "teacher" in (self.labels, self.failure) or self.weighting.needs_teacher or self.divergence.needs_teacher

    def check(self, targets: BlockTargets) -> None:
        """Refuse a batch that lacks what the objective needs.

        Raises:
            UserError: the objective needs the target's log-probs, or the mass they hold, and the batch has none.
        """
        if self.needs_teacher and (targets.teacher_ids is None or targets.teacher_logprobs is None):
            raise UserError(
                "the loss needs the target's top-k log-probs but the batch has none: build the cache with top-k, or "
                "train with a loss that compares with data tokens, such as auf or decay"
            )
        if (self.weighting.needs_teacher or self.divergence.needs_teacher) and targets.head_mass is None:
            raise UserError(
                "the loss needs head_mass, the probability that the target's top-k hold together, but the batch has "
                "none: the tail cannot be renormalised away; build the cache again, or train with auf"
            )

    def prefix(self, targets: BlockTargets) -> Bool[Tensor, "blocks slots"]:
        """Each block's slots before the first one that cannot be scored."""
        valid = targets.valid
        if self.labels == "teacher":
            valid = valid & top1_known(targets)
        return valid_prefix(valid)

    def tokens(self, targets: BlockTargets, source: Source) -> Int[Tensor, "blocks slots"]:
        """The token each slot should have said, 0 outside the valid prefix."""
        if source == "data":
            tokens = targets.labels
        else:
            assert targets.teacher_ids is not None
            tokens = targets.teacher_ids[..., 0]
        return zero_where_not(self.prefix(targets), tokens.long())

    def accepted(self, targets: BlockTargets) -> Int[Tensor, "blocks slots"]:
        """The token that verification would accept at each slot; -1 where the drafter cannot say it."""
        tokens = self.tokens(targets, self.failure)
        if self.failure == "teacher":
            tokens = tokens.masked_fill(~top1_known(targets), -1)
        return tokens

    def weigh(self, evidence: Evidence, step: int) -> Float[Tensor, "blocks slots"]:
        """w[b, k] at a step, detached, and 0 outside the valid prefix whatever a weighting of one's own says.

        Raises:
            UserError: they are not one number for each slot of each block.
        """
        weights = self.weighting(evidence, step).detach()
        if weights.shape != evidence.valid.shape:
            raise UserError(
                f"weighting {type(self.weighting).__name__}: weights of shape {tuple(weights.shape)} found, "
                f"{tuple(evidence.valid.shape)} expected: return one for each block and slot"
            )
        return zero_where_not(evidence.valid, weights)

    def teacher(
        self, targets: BlockTargets, prefix: Bool[Tensor, "blocks slots"], dtype: torch.dtype
    ) -> Teacher | None:
        """The batch's teacher with this objective's bound on alpha."""
        return Teacher.of(targets, prefix, dtype, self.alpha_bound)

    def evidence(
        self, draft: DraftReading, teacher: Teacher | None, correct: Tensor, prefix: Bool[Tensor, "blocks slots"]
    ) -> Evidence:
        """What the weighting may look at, detached from the graph."""
        draft = draft.detach()
        alpha = None if teacher is None else acceptance_probability(draft, teacher)
        return Evidence(prefix, correct & prefix, draft.label.exp(), alpha)

    def block_scale(self, weights: Float[Tensor, "blocks slots"]) -> Float[Tensor, "blocks 1"]:
        """Factor of each block's weighted sum in the numerator: 1, or 1 / (the block's weights) for "block"."""
        total = weights.sum(-1, keepdim=True)
        if self.reduction != "block":
            return torch.ones_like(total)
        return torch.where(total > 0, 1 / total.clamp_min(torch.finfo(total.dtype).tiny), torch.zeros_like(total))

    def denominator(
        self, weights: Float[Tensor, "blocks slots"], prefix: Bool[Tensor, "blocks slots"]
    ) -> Float[Tensor, ""]:
        """Sum of weights (token), number of blocks with weight (block), or with a valid slot (block_sum)."""
        if self.reduction == "token":
            return weights.sum()
        counted = (weights > 0) if self.reduction == "block" else prefix
        return counted.any(-1).sum().to(weights.dtype)

    def loss(self, logits: Float[Tensor, "blocks slots vocab"], targets: BlockTargets, step: int = 0) -> LossOutput:
        """The loss from dense logits, in the plain form. Training uses `block_loss`: same value, less memory.

        Args:
            logits: the drafter's, of the drafted slots k = 1..B-1; half precision is widened to float32.
            targets: what to compare with.
            step: optimizer step, for weightings that change over training.

        Raises:
            UserError: the objective needs the target's log-probs and the batch has none.
        """
        self.check(targets)
        prefix = self.prefix(targets)
        teacher = self.teacher(targets, prefix, torch.promote_types(logits.dtype, torch.float32))
        draft = read_logits(logits, prefix, self.tokens(targets, self.labels), teacher)
        correct = logits.detach().argmax(-1) == self.accepted(targets)
        evidence = self.evidence(draft, teacher, correct, prefix)
        weights = self.weigh(evidence, step)
        losses = zero_where_not(prefix, self.divergence(draft, teacher))
        numerator = (self.block_scale(weights) * weights * losses).sum()
        return LossOutput(
            numerator=numerator,
            denominator=self.denominator(weights, prefix),
            weights=weights,
            losses=losses.detach(),
            valid=prefix,
            seen=prefix,
            correct=evidence.correct,
            alpha=evidence.alpha,
        )


def top1_known(targets: BlockTargets) -> Bool[Tensor, "blocks slots"]:
    """The target's most probable token is in the drafter's vocabulary."""
    assert targets.teacher_logprobs is not None
    return ~targets.teacher_logprobs[..., 0].isneginf()
