"""What a drafter proposes in one cycle, and how its tokens are chosen from logits."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from specauf.drafters.vocabulary import TargetVocabulary


@dataclass(frozen=True)
class Proposal:
    """Drafted tokens of one cycle.

    Attributes:
        tokens: target ids.
        probs: the distribution each was drawn from, over the target's vocabulary; None when they are argmaxes.
    """

    tokens: Int[Tensor, "prompts slots"]
    probs: Float[Tensor, "prompts slots vocab"] | None = None

    def first(self, slots: int) -> "Proposal":
        """The first slots alone."""
        return Proposal(self.tokens[:, :slots], None if self.probs is None else self.probs[:, :slots])


# Draft logits -> (index of the chosen column, the distribution it was drawn from or None for an argmax).
Choose = Callable[[Tensor], tuple[Tensor, Tensor | None]]


def greedy(logits: Float[Tensor, "*rows vocab"]) -> tuple[Int[Tensor, "*rows"], None]:
    """The most probable token."""
    return logits.argmax(-1), None


def left_to_right(
    slots: int,
    anchor_tokens: Int[Tensor, " prompts"],
    vocabulary: TargetVocabulary,
    choose: Choose,
    logits_of: Callable[[int, Tensor], Tensor],
) -> Proposal:
    """Draft slot by slot.

    Args:
        slots: how many.
        anchor_tokens: stand before the first.
        vocabulary: the target's.
        choose: a column from the logits [prompts, draft_vocab] of one slot.
        logits_of: these, from the slot's number (from 0) and the tokens before it.
    """
    token, tokens, probs = anchor_tokens, [], []
    for slot in range(slots):
        column, chances = choose(logits_of(slot, token))
        token = vocabulary.to_target(column)
        tokens.append(token)
        if chances is not None:
            probs.append(vocabulary.widen(chances))
    return Proposal(torch.stack(tokens, 1), torch.stack(probs, 1) if probs else None)
