"""What the drafter's logits say about each slot: the only thing that weightings and divergences look at."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from specauf.data.batch import BlockTargets


def valid_prefix(valid: Bool[Tensor, "blocks slots"]) -> Bool[Tensor, "blocks slots"]:
    """The slots before the first invalid one: a hole ends the block, as it would end acceptance.

    Args:
        valid: the slot lies inside the document and is supervised.
    """
    return valid.cumprod(dim=-1).bool()


def zero_where_not(mask: Bool[Tensor, "*slots"], values: Shaped[Tensor, "*slots"]) -> Shaped[Tensor, "*slots"]:
    """`values` where `mask` is set and 0 elsewhere, even where they are infinite or NaN."""
    return torch.where(mask, values, torch.zeros_like(values))


@dataclass(frozen=True)
class Teacher:
    """The target's distribution at each slot in sparse form: K most probable tokens and one tail bucket.

    Attributes:
        ids: the K tokens; where not `known`, one that can be looked up without harm.
        known: the entry counts. False outside the valid prefix, and for tokens (log-prob -inf) that a draft vocabulary
            lacks: their probability is part of the tail.
        logprobs: log p of the K tokens, in nats, absolute; 0 where not known.
        tail: probability of all other tokens together, 1 - head_mass, never below 0.
        alpha_bound: which bound stands for alpha = sum_v min(p_v, q_v), see `acceptance_probability`.
    """

    ids: Int[Tensor, "blocks slots k"]
    known: Bool[Tensor, "blocks slots k"]
    logprobs: Float[Tensor, "blocks slots k"]
    tail: Float[Tensor, "blocks slots"]
    alpha_bound: Literal["lower", "upper"] = "lower"

    @classmethod
    def of(
        cls,
        targets: BlockTargets,
        prefix: Bool[Tensor, "blocks slots"],
        dtype: torch.dtype,
        alpha_bound: Literal["lower", "upper"] = "lower",
    ) -> "Teacher | None":
        """The teacher that a batch carries, or None when it carries none."""
        if targets.teacher_ids is None or targets.teacher_logprobs is None or targets.head_mass is None:
            return None
        known = ~targets.teacher_logprobs.isneginf() & prefix[..., None]
        # Entries that do not count repeat one that does, so that they touch no other token's probability.
        first = known.to(torch.uint8).argmax(-1, keepdim=True)
        ids = targets.teacher_ids.long()
        ids = ids.where(known, ids.gather(-1, first))
        return cls(
            ids=ids.where(prefix[..., None], torch.zeros_like(ids)),
            known=known,
            logprobs=zero_where_not(known, targets.teacher_logprobs.to(dtype)),
            tail=zero_where_not(prefix, (1 - targets.head_mass.to(dtype)).clamp_min(0)),
            alpha_bound=alpha_bound,
        )

    def __getitem__(self, part: tuple[Tensor, slice]) -> "Teacher":
        """Some slots of some blocks."""
        return Teacher(self.ids[part], self.known[part], self.logprobs[part], self.tail[part], self.alpha_bound)

    @property
    def probs(self) -> Float[Tensor, "blocks slots k"]:
        """Probability of the K tokens; 0 where not known."""
        return self.logprobs.exp() * self.known


@dataclass(frozen=True)
class DraftReading:
    """What is read from one row of draft logits per slot; everything is 0 outside the block's valid prefix.

    Differentiable: the dense [blocks slots vocabulary] logits are touched here and nowhere else.

    Attributes:
        label: log q of the label, in nats.
        head: log q of the teacher's K tokens, 0 where they are not known; None without a teacher.
        tail: log of the probability that q gives to all other tokens; None without a teacher.
    """

    label: Float[Tensor, "blocks slots"]
    head: Float[Tensor, "blocks slots k"] | None = None
    tail: Float[Tensor, "blocks slots"] | None = None

    def detach(self) -> "DraftReading":
        """The same numbers without a graph."""
        head = None if self.head is None else self.head.detach()
        return DraftReading(self.label.detach(), head, None if self.tail is None else self.tail.detach())


@dataclass(frozen=True)
class Evidence:
    """What a weighting may look at. Everything is detached, so no weight can carry a gradient.

    Attributes:
        valid: the block's contiguous valid prefix.
        correct: the drafter's greedy token equals the one that verification would accept.
        label_prob: q of the label.
        alpha: sum_v min(p_v, q_v), the chance that a sampled draft token is accepted; None without a teacher.
    """

    valid: Bool[Tensor, "blocks slots"]
    correct: Bool[Tensor, "blocks slots"]
    label_prob: Float[Tensor, "blocks slots"]
    alpha: Float[Tensor, "blocks slots"] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights: float32, or float64 for float64 logits."""
        return self.label_prob.dtype


def read_logits(
    logits: Float[Tensor, "blocks slots vocab"],
    prefix: Bool[Tensor, "blocks slots"],
    labels: Int[Tensor, "blocks slots"],
    teacher: Teacher | None,
) -> DraftReading:
    """Read dense logits in the plain, differentiable way: the form that `block_loss` is tested against.

    Half-precision logits are widened to float32 first.
    """
    logprobs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    label = zero_where_not(prefix, logprobs.gather(-1, labels[..., None])[..., 0])
    if teacher is None:
        return DraftReading(label)
    in_head = torch.zeros_like(logprobs).scatter_add(-1, teacher.ids, teacher.known.to(logprobs.dtype)) > 0
    tail = log_tail(zero_where_not(~in_head, logprobs.exp()).sum(-1))
    head = zero_where_not(teacher.known, logprobs.gather(-1, teacher.ids))
    return DraftReading(label, head, zero_where_not(prefix, tail))


def log_tail(mass: Float[Tensor, "*rows"]) -> Float[Tensor, "*rows"]:
    """Log of the tail's probability; finite, with zero gradient, when K tokens are the whole vocabulary."""
    return mass.clamp_min(torch.finfo(mass.dtype).tiny).log()


def acceptance_probability(draft: DraftReading, teacher: Teacher) -> Float[Tensor, "blocks slots"]:
    """The acceptance probability alpha = sum_v min(p_v, q_v) = 1 - TV(p, q).

    It is the chance that a draft token sampled from q is accepted. The tail's tokens are not known one by one, so alpha
    is only bounded:

        sum_K min(p, q)  <=  alpha  <=  sum_K min(p, q) + min(p_tail, q_tail)

    `teacher.alpha_bound` says which one is returned; they agree when K is the whole vocabulary.
    """
    assert draft.head is not None
    assert draft.tail is not None
    alpha = torch.minimum(teacher.probs, draft.head.exp()).sum(-1)
    if teacher.alpha_bound == "upper":
        alpha = alpha + torch.minimum(teacher.tail, draft.tail.exp())
    return alpha
