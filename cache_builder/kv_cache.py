"""A key-value cache made once and written in place: rows are slots that finished documents leave to live ones."""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin


@dataclass
class _View:
    """What the next pass sees: some rows, their columns from `first` on, of which `filled` come before its own."""

    rows: slice
    first: int
    filled: int


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, [rows, heads, columns, width], of which a pass reads a view.

    Transformers' own caches concatenate at every step or hand the whole preallocated length to attention.
    """

    is_sliding = False
    is_compileable = False

    def __init__(self, view: _View, rows: int, columns: int) -> None:
        super().__init__()
        self.view, self.rows, self.columns = view, rows, columns

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take the memory when heads, widths and types are known; zeros, for NaN would pass through a masked column."""
        _, heads, _, width = key_states.shape
        self.keys = key_states.new_zeros((self.rows, heads, self.columns, width))
        self.values = value_states.new_zeros((self.rows, value_states.shape[1], self.columns, value_states.shape[-1]))
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Float[Tensor, "batch heads columns width"], Float[Tensor, "batch heads columns values"]]:
        """Write the new columns and return all up to and with them, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        rows, first, start = self.view.rows, self.view.first, self.view.first + self.view.filled
        end = start + key_states.shape[-2]
        self.keys[rows, :, start:end] = key_states
        self.values[rows, :, start:end] = value_states
        return self.keys[rows, :, first:end], self.values[rows, :, first:end]

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Columns that attention sees, and the first one's number."""
        # The first releases of transformers 5 give the positions themselves.
        return self.view.filled + (len(query_length) if isinstance(query_length, Tensor) else query_length), 0

    def get_seq_length(self) -> int:
        """Columns before the pass."""
        return self.view.filled

    def get_max_cache_shape(self) -> int:
        """Unbounded, as far as attention is concerned."""
        return -1

    def get_max_length(self) -> int:
        """Columns there is room for."""
        return self.columns


class SlotCache(Cache):
    """The cache of all layers.

    Args:
        layers: how many.
        rows: slots.
        columns: tokens a slot has room for.
    """

    def __init__(self, layers: int, rows: int, columns: int) -> None:
        self.view = _View(slice(0, rows), 0, 0)
        self.rows, self.columns = rows, columns
        self.slot_layers = [SlotLayer(self.view, rows, columns) for _ in range(layers)]
        super().__init__(layers=list(self.slot_layers))

    def look(self, rows: slice, first: int, filled: int) -> None:
        """Choose the rows of the next pass, its first column, and how many columns from there on are filled."""
        self.view.rows, self.view.first, self.view.filled = rows, first, filled

    def move(self, source: int, goal: int, columns: slice) -> None:
        """Copy some of a row's columns over another row's."""
        for stored in self._tables():
            stored[goal, :, columns] = stored[source, :, columns]

    def take(self, row: int, columns: slice) -> list[Float[Tensor, "heads columns _"]]:
        """Copies of some of a row's columns, for `put`."""
        return [stored[row, :, columns].clone() for stored in self._tables()]

    def put(self, row: int, start: int, taken: list[Float[Tensor, "heads columns _"]]) -> None:
        """Write what `take` gave to a row, from a column on."""
        for stored, part in zip(self._tables(), taken, strict=True):
            stored[row, :, start : start + part.shape[1]] = part

    def _tables(self) -> list[Tensor]:
        """Keys and values of all layers that have been used."""
        return [stored for layer in self.slot_layers for stored in (layer.keys, layer.values) if stored is not None]
