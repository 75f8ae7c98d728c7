"""Drafters whose proposals are known in advance, for testing the loop that verifies them."""

import torch
from jaxtyping import Int
from torch import Tensor

from specauf.drafters import DFlashDrafter, DrafterConfig, Proposal


class ScriptedDrafter(DFlashDrafter):
    """Proposes the true continuation of a known text, spoilt at some slots.

    Args:
        config: of a tiny drafter.
        texts: full token sequences, prompt and answer.
        right: whether slot k (1, 2, ...) is right.
    """

    def __init__(self, config: DrafterConfig, texts: list[list[int]], right) -> None:
        super().__init__(config)
        self.texts, self.right = texts, right

    def remember(self, memory, tokens, features, counts, vocabulary) -> None:
        # The memory drops finished prompts by itself, so what was committed is kept in there.
        rows = tokens[:, :, None, None].double()
        memory.append(0, rows, rows)
        memory.commit(counts)

    def draft(self, memory, anchor_tokens: Int[Tensor, " prompts"], slots: int, vocabulary, choose=None) -> Proposal:
        tokens = torch.zeros(len(anchor_tokens), slots, dtype=torch.int64)
        committed = memory.rows(0)[0][:, :, 0, 0].long()
        for row, length in enumerate(memory.lengths):
            known = [*committed[row, :length].tolist(), int(anchor_tokens[row])]
            # In half precision an answer may leave its text; from then on nothing is right.
            text = next((t for t in self.texts if t[: length + 1] == known), known)
            for k in range(1, slots + 1):
                true = text[length + k] if length + k < len(text) else 0
                tokens[row, k - 1] = true if self.right(k) else (true + 1) % self.config.vocab_size
        return Proposal(tokens)


ALWAYS_RIGHT = lambda k: True  # noqa: E731
ALWAYS_WRONG = lambda k: False  # noqa: E731
ALTERNATING = lambda k: k % 2 == 1  # noqa: E731
