"""The only passes over dense logits: read a few numbers from each row, then turn their gradient into the row's.

Everything an objective uses is a function of log q at a few tokens and of the rest's total probability, so

    dL/dlogit_v = [v is read] g_v  +  [v in the tail] g_tail q_v / q_tail  -  (sum of all g) q_v

needs one softmax and a handful of scattered numbers, and no graph over [rows vocabulary].
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from specauf.objectives.evidence import log_tail, zero_where_not


@dataclass(frozen=True)
class DenseRows:
    """Rows of logits after reading.

    Attributes:
        greedy: the most probable token.
        label: log q(label).
        head: log q of the teacher's K tokens, or None.
        tail: log of the probability outside those K, or None.
        softmax: q over the whole vocabulary, but 0 at the head's known tokens. Overwritten by `logit_gradient`.
    """

    greedy: Int[Tensor, " rows"]
    label: Float[Tensor, " rows"]
    head: Float[Tensor, "rows k"] | None
    tail: Float[Tensor, " rows"] | None
    softmax: Float[Tensor, "rows vocab"]


def read_rows(
    logits: Float[Tensor, "rows vocab"],
    labels: Int[Tensor, " rows"],
    teacher_ids: Int[Tensor, "rows k"] | None = None,
    known: Bool[Tensor, "rows k"] | None = None,
    *,
    overwrite: bool = False,
) -> DenseRows:
    """Read rows of logits, in at least float32.

    Args:
        logits: detached.
        labels: token whose log-prob is wanted.
        teacher_ids: tokens of the teacher's head.
        known: which of them count; the others repeat one that does, or none of the row counts.
        overwrite: the logits' memory may be used for the softmax.
    """
    greedy = logits.argmax(-1)
    wide = torch.promote_types(logits.dtype, torch.float32)
    top = logits.gather(-1, greedy[:, None]).to(wide)
    label = logits.gather(-1, labels[:, None]).to(wide) - top
    head = None if teacher_ids is None else logits.gather(-1, teacher_ids).to(wide) - top
    if logits.dtype == wide:
        softmax = (logits if overwrite else logits.clone()).sub_(top).exp_()
        total = softmax.sum(-1, keepdim=True)
        softmax.div_(total)
        log_total = total.log()
    else:  # one kernel on a GPU, from half precision to whole, in place of five
        softmax = logits.softmax(-1, dtype=wide)
        log_total = -softmax.gather(-1, greedy[:, None]).log()
    if head is None:
        return DenseRows(greedy, (label - log_total)[:, 0], None, None, softmax)
    assert teacher_ids is not None
    assert known is not None
    in_tail = softmax.gather(-1, teacher_ids) * ~known.any(-1, keepdim=True)
    softmax.scatter_(-1, teacher_ids, in_tail)
    head = zero_where_not(known, head - log_total)
    return DenseRows(greedy, (label - log_total)[:, 0], head, log_tail(softmax.sum(-1)), softmax)


def logit_gradient(
    rows: DenseRows,
    labels: Int[Tensor, " rows"],
    label_grad: Float[Tensor, " rows"],
    teacher_ids: Int[Tensor, "rows k"] | None = None,
    known: Bool[Tensor, "rows k"] | None = None,
    head_grad: Float[Tensor, "rows k"] | None = None,
    tail_grad: Float[Tensor, " rows"] | None = None,
) -> Float[Tensor, "rows vocab"]:
    """Gradient of a function of (label, head, tail) with respect to the logits, written over `rows.softmax`."""
    total = label_grad.clone()
    gradient = rows.softmax
    if teacher_ids is None:
        gradient.mul_(-total[:, None])
    else:
        assert rows.head is not None
        assert rows.tail is not None
        assert head_grad is not None
        assert tail_grad is not None
        assert known is not None
        head_grad = head_grad * known
        # log_tail is constant where it clamps.
        tail_grad = tail_grad * (rows.tail > log_tail(torch.zeros_like(rows.tail)))
        total += head_grad.sum(-1) + tail_grad
        # The head's entries are exactly 0 here, so that adding to them is exact even when q_tail is tiny.
        gradient.mul_((tail_grad * torch.exp(-rows.tail) - total)[:, None])
        gradient.scatter_add_(-1, teacher_ids, head_grad - total[:, None] * rows.head.exp() * known)
    return gradient.scatter_add_(-1, labels[:, None], label_grad[:, None])
