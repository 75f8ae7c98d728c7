"""Divergences from the target's distribution p, of which the cache holds K tokens and the rest's total mass.

Both p and q are compared on K + 1 outcomes: the K tokens and one tail bucket. Merging outcomes never raises a
divergence, so these are lower bounds of the dense values, and equal them when K is the whole vocabulary. Nothing is
renormalised: leaving the tail out would teach the drafter to be over-confident (arXiv 2503.16870).
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from specauf.errors import UserError
from specauf.objectives.divergence import Divergence
from specauf.objectives.evidence import DraftReading, Teacher, acceptance_probability

# A stored mass is exact to about this: a tail below it is a rounding error and not a zero.
SMALLEST_TAIL = 2.0**-23


def _outcomes(draft: DraftReading, teacher: Teacher | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """p, log p, q, log q over the K + 1 outcomes; an unknown entry has p = q = 0 and finite logarithms."""
    assert teacher is not None
    assert draft.head is not None
    assert draft.tail is not None
    p = torch.cat([teacher.probs, teacher.tail[..., None]], -1)
    log_p = torch.cat([teacher.logprobs, teacher.tail[..., None].clamp_min(SMALLEST_TAIL).log()], -1)
    q = torch.cat([draft.head.exp() * teacher.known, draft.tail.exp()[..., None]], -1)
    log_q = torch.cat([draft.head, draft.tail[..., None]], -1)
    return p, log_p, q, log_q


def _finite(log_q: Tensor) -> Tensor:
    """For factors q: 0 log 0 is 0, where a drafter rules a token out by a logit of -inf."""
    return log_q.clamp_min(-(torch.finfo(log_q.dtype).max ** 0.5))


def forward_kl(draft: DraftReading, teacher: Teacher | None) -> Float[Tensor, "blocks slots"]:
    """KL(p || q) = sum_K p log(p/q) + p_tail log(p_tail / q_tail), in nats."""
    p, log_p, _, log_q = _outcomes(draft, teacher)
    return (p * (log_p - log_q)).sum(-1)


class ForwardKL(Divergence):
    """Distillation as usual: q must cover what the target finds likely. See `forward_kl`."""

    needs_teacher = True

    def __call__(self, draft: DraftReading, teacher: Teacher | None) -> Float[Tensor, "blocks slots"]:
        """See `forward_kl`."""
        return forward_kl(draft, teacher)


class ReverseKL(Divergence):
    """KL(q || p) = sum_K q log(q/p) + q_tail log(q_tail / p_tail): q must avoid what the target finds unlikely.

    A tail that the cache stores as 0 counts as 2^-23, the precision of the stored mass.
    """

    needs_teacher = True

    def __call__(self, draft: DraftReading, teacher: Teacher | None) -> Float[Tensor, "blocks slots"]:
        """See the class."""
        _, log_p, q, log_q = _outcomes(draft, teacher)
        return (q * (_finite(log_q) - log_p)).sum(-1)


class JensenShannon(Divergence):
    """JS = KL(p || m) / 2 + KL(q || m) / 2 with m = (p + q) / 2: symmetric and at most log 2."""

    needs_teacher = True

    def __call__(self, draft: DraftReading, teacher: Teacher | None) -> Float[Tensor, "blocks slots"]:
        """See the class."""
        p, log_p, q, log_q = _outcomes(draft, teacher)
        middle = ((p + q) / 2).clamp_min(torch.finfo(p.dtype).tiny).log()
        return (p * (log_p - middle) + q * (_finite(log_q) - middle)).sum(-1) / 2


class TotalVariation(Divergence):
    """TV = 1 - alpha: the chance that a sampled draft token is rejected. DSpark's L1 term is twice this."""

    needs_teacher = True

    def __call__(self, draft: DraftReading, teacher: Teacher | None) -> Float[Tensor, "blocks slots"]:
        """See the class."""
        assert teacher is not None
        return 1 - acceptance_probability(draft, teacher)


class NegativeLogAcceptance(Divergence):
    """-log alpha: total variation's gradient divided by alpha, so slots that are nearly lost still learn.

    Source: LK losses, arXiv 2602.23881. It is cross-entropy when p is a point mass.
    """

    needs_teacher = True

    def __call__(self, draft: DraftReading, teacher: Teacher | None) -> Float[Tensor, "blocks slots"]:
        """See the class."""
        assert teacher is not None
        alpha = acceptance_probability(draft, teacher)
        return -alpha.clamp_min(torch.finfo(alpha.dtype).tiny).log()


class LKHybrid(Divergence):
    """lambda KL(p || q) + (1 - lambda)(1 - alpha), lambda = exp(-lk_rate * alpha), alpha detached in lambda.

    KL while the drafter is far off, total variation once it is close. Source: LK losses, arXiv 2602.23881.

    Args:
        lk_rate: how soon total variation takes over.
    """

    needs_teacher = True

    def __init__(self, lk_rate: float = 3.0):
        if lk_rate < 0:
            raise UserError(f"loss lk_rate is {lk_rate}: give at least 0, such as 3")
        self.lk_rate = lk_rate

    def __call__(self, draft: DraftReading, teacher: Teacher | None) -> Float[Tensor, "blocks slots"]:
        """See the class."""
        assert teacher is not None
        alpha = acceptance_probability(draft, teacher)
        ratio = torch.exp(-self.lk_rate * alpha.detach())
        return ratio * forward_kl(draft, teacher) + (1 - ratio) * (1 - alpha)


class ExpectedAcceptedLength(Divergence):
    """l[k] = -prod_{j<=k} a_j, so that the sum over a block's slots is -E[A].

    E[A] = sum_k P(A >= k), and slot k is accepted when all slots up to it are. Slots of a block are coupled: a slot's
    gradient is larger the more can follow it. Reduction block_sum makes the loss -E[A] per block.

    Args:
        acceptance: a_j. alpha: under sampled verification, sum_v min(p_v, q_v). label: q(y_j), what alpha is when the
            target is certain of the label; needs no teacher.
    """

    slot_by_slot = False

    def __init__(self, acceptance: Literal["alpha", "label"] = "alpha"):
        self.acceptance = acceptance
        self.needs_teacher = acceptance == "alpha"

    def __call__(self, draft: DraftReading, teacher: Teacher | None) -> Float[Tensor, "blocks slots"]:
        """See the class."""
        if self.acceptance == "label":
            accepted = draft.label.exp()
        else:
            assert teacher is not None
            accepted = acceptance_probability(draft, teacher)
        return -accepted.cumprod(dim=-1)
