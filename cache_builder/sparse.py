"""The target's sparse distribution: exact logsumexp over the whole vocabulary, chunked over rows."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from specauf.errors import UserError
from specauf.linear import linear


def topk_logprobs(
    hidden: Float[Tensor, "rows hidden"],
    lm_head: Float[Tensor, "vocabulary hidden"],
    k: int,
    *,
    chunk: int = 512,
    softcap: float | None = None,
) -> tuple[Int[Tensor, "rows k"], Float[Tensor, "rows k"]]:
    """The k most probable tokens of each row and their exact log-probabilities.

    Args:
        hidden: the target's final-normed hidden states, only of rows to keep: the head is the cost.
        lm_head: weight of the output head.
        k: entries a row.
        chunk: rows whose logits exist at once: chunk x vocabulary x 4 bytes.
        softcap: Gemma's c in c * tanh(logits / c).

    Returns:
        Token ids, most probable first, and log-probabilities in nats, float32, normalised over the whole vocabulary.
        Of equally probable tokens the smaller id comes first, and the first of all is `argmax`, as in greedy decoding;
        which of those that tie with the k-th stay out is torch's choice.

    Raises:
        UserError: k is larger than the vocabulary, or the target's logits hold NaN or +Inf.
    """
    if not 1 <= k <= lm_head.shape[0]:
        raise UserError(f"k is {k}, the target's vocabulary has {lm_head.shape[0]} tokens: give a k from 1 to that")
    ids, values = [], []
    for rows in hidden.split(chunk):
        logits = linear(rows, lm_head)
        if softcap is not None:  # in the target's own type, as it does itself: what ties there must tie here
            logits = torch.tanh(logits / softcap) * softcap
        logits = logits.float()
        normaliser = torch.logsumexp(logits, -1, keepdim=True)
        if not torch.isfinite(normaliser).all():
            raise UserError("the target's logits hold NaN or Inf: compute in float32, or check the weights")
        best, where = _order_ties(*logits.topk(k))
        # More than k tokens may share the maximum, and then the smallest id need not be among those that topk found.
        cut = best[:, 0] == best[:, -1]
        where[cut, 0] = logits[cut].argmax(-1)
        ids.append(where)
        values.append(best - normaliser)
    if not ids:
        return torch.empty((0, k), dtype=torch.int64), torch.empty((0, k))
    return torch.cat(ids), torch.cat(values)


def _order_ties(
    values: Float[Tensor, "rows k"], ids: Int[Tensor, "rows k"]
) -> tuple[Float[Tensor, "rows k"], Int[Tensor, "rows k"]]:
    """Entries by falling value, and by rising id where values are equal; torch.topk promises no order there."""
    ids, order = ids.sort(-1)
    values, by_value = values.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(-1, by_value)


def keep_mass(logprobs: Float[Tensor, "rows k"], top_p: float) -> Float[Tensor, "rows k"]:
    """Log-probabilities with -inf after the fewest entries of each row that reach `top_p` together.

    The entry that reaches it is kept, so every row keeps at least one.
    """
    before = logprobs.exp().cumsum(-1) - logprobs.exp()
    beyond = before >= top_p
    beyond[:, :1] = False
    return logprobs.masked_fill(beyond, -torch.inf)
