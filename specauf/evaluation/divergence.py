"""Where two answers part, and how close the target was to saying the other thing."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

# Rounding moves a logit by a few units in the last place of the type that the target computes in.
NEAR_TIE_ULPS = 4.0


def first_difference(found: Sequence[int], expected: Sequence[int]) -> int | None:
    """Index of the first token that differs, or where the shorter one ends; None when they are equal."""
    for i, (a, b) in enumerate(zip(found, expected, strict=False)):
        if a != b:
            return i
    return None if len(found) == len(expected) else min(len(found), len(expected))


@torch.no_grad()
def divergence(
    target: Any, input_ids: Int[Tensor, "1 tokens"], found: Sequence[int], expected: Sequence[int]
) -> dict[str, Any] | None:
    """The first divergence of an answer from the plain one; None when there is none.

    The gap is the difference of the two tokens' logits in one pass over the prompt and the common tokens. A gap of a
    few units in the last place means that only the order of additions decided (a near-tie); anything larger means that
    decoding is wrong.

    Args:
        target: the causal LM.
        input_ids: the prompt.
        found: the answer.
        expected: plain decoding's answer.
    """
    at = first_difference(found, expected)
    if at is None:
        return None
    record: dict[str, Any] = {"position": at, "expected": None, "found": None, "logit_gap": None, "near_tie": False}
    if at < min(len(found), len(expected)):
        common = torch.tensor([list(expected[:at])], dtype=input_ids.dtype, device=input_ids.device)
        logits = target(torch.cat([input_ids, common], 1), logits_to_keep=1).logits[0, -1].float()
        a, b = int(expected[at]), int(found[at])
        gap = float((logits[a] - logits[b]).abs())
        limit = NEAR_TIE_ULPS * torch.finfo(target.dtype).eps * float(logits[[a, b]].abs().max())
        record |= {"expected": a, "found": b, "logit_gap": gap, "near_tie": gap <= limit}
    return record
