"""Key-value cache of the target for block verification: written in place, one length per prompt, cropped for free."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class _RowLayer(DynamicLayer):
    """One layer's keys and values, [prompts, heads, capacity, head_dim], with room to grow."""

    keys: Tensor
    values: Tensor

    def __init__(self, lengths: list[int]) -> None:
        super().__init__()
        self.lengths = lengths

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new rows behind each prompt's committed ones; returns all rows up to the longest."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, longest = key_states.shape[-2], max(self.lengths)
        self.keys = _with_room(self.keys, key_states, longest + rows)
        self.values = _with_room(self.values, value_states, longest + rows)
        for held, new in ((self.keys, key_states), (self.values, value_states)):
            if len(self.lengths) == 1:
                held.narrow(2, longest, rows).copy_(new)  # a quarter less time than indexing, and there are two a layer
                continue
            for prompt, length in enumerate(self.lengths):
                held[prompt, :, length : length + rows] = new[prompt]
        return self.keys.narrow(2, 0, longest + rows), self.values.narrow(2, 0, longest + rows)

    def lazy_initialization(self, key_states: Tensor, *args: Any) -> None:
        """Start empty, with the type of the first keys."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = self.values = key_states.new_empty(0)
        self.is_initialized = True

    def get_seq_length(self, *args: Any) -> int:
        """Committed rows of the longest prompt."""
        return max(self.lengths)


class RowCache(Cache):
    """A transformers cache in which every prompt of a batch has its own length.

    Layers hold all rows, also those behind a sliding window: the model's own mask takes care of the window. Rows beyond
    a prompt's length are what earlier blocks left behind; they are masked or overwritten, so cropping is free.

    Args:
        prompts: how many are decoded together.
        num_layers: of the target.
    """

    def __init__(self, prompts: int, num_layers: int) -> None:
        self.lengths = [0] * prompts
        self.rows = [_RowLayer(self.lengths) for _ in range(num_layers)]
        super().__init__(layers=list(self.rows))

    def commit(self, counts: list[int]) -> None:
        """Let the first `counts[p]` rows of the last forward pass count for prompt p."""
        for prompt, count in enumerate(counts):
            self.lengths[prompt] += count

    def keep(self, prompts: list[int]) -> None:
        """Drop all other prompts."""
        self.lengths[:] = [self.lengths[p] for p in prompts]
        for layer in self.rows:
            # Layers that share another's keys never hold their own.
            if layer.is_initialized:
                layer.keys, layer.values = layer.keys[prompts], layer.values[prompts]

    def positions(self, rows: int, device: torch.device) -> Int[Tensor, "prompts rows"]:
        """Positions of the next rows of each prompt."""
        return torch.tensor(self.lengths, device=device)[:, None] + torch.arange(rows, device=device)

    def mask(self, rows: int, device: torch.device, dtype: torch.dtype) -> Float[Tensor, "prompts one rows columns"]:
        """Causal mask of the next rows over each prompt's own rows: 0 or the least number, to be added to scores."""
        columns = torch.arange(max(self.lengths) + rows, device=device)
        behind = columns > self.positions(rows, device)[..., None]
        # Eager attention adds what it is given: a mask of booleans would mask nothing there.
        nothing = torch.zeros(behind.shape, dtype=dtype, device=device)
        return nothing.masked_fill(behind, torch.finfo(dtype).min)[:, None]


def _with_room(buffer: Tensor, like: Tensor, rows: int) -> Tensor:
    """The buffer, grown at least twofold when `rows` do not fit."""
    if buffer.numel() and buffer.shape[-2] >= rows:
        return buffer
    old = buffer.shape[-2] if buffer.numel() else 0
    # Zeros and not empty memory: a masked NaN is still a NaN after the softmax's product.
    grown = like.new_zeros(*like.shape[:-2], max(rows, 2 * old), like.shape[-1])
    if old:
        grown[..., :old, :] = buffer
    return grown
