"""Keys and values of committed context rows while decoding: grown in place, one length per prompt."""

from jaxtyping import Float
from torch import Tensor

from specauf.drafters.blocks import KeyValue


class ContextMemory:
    """Context keys and values of some prompts decoded together, for every layer.

    Rows are only ever appended: the drafter's context holds committed tokens alone, so nothing is taken back.

    Attributes:
        lengths: committed rows of each prompt.
    """

    def __init__(self, prompts: int) -> None:
        self.lengths = [0] * prompts
        self._layers: list[tuple[Tensor, Tensor]] = []

    @property
    def capacity(self) -> int:
        """Rows that fit before the next growth."""
        return self._layers[0][0].shape[1] if self._layers else 0

    def append(
        self,
        layer: int,
        key: Float[Tensor, "prompts rows kv_heads head_dim"],
        value: Float[Tensor, "prompts rows kv_heads head_dim"],
    ) -> None:
        """Write rows behind each prompt's committed ones; `commit` makes them count."""
        while len(self._layers) <= layer:
            empty = key.new_empty(key.shape[0], 0, *key.shape[2:])
            self._layers.append((empty, empty))
        rows, end = key.shape[1], max(self.lengths) + key.shape[1]
        if end > self._layers[layer][0].shape[1]:
            self._layers[layer] = (
                _grown(self._layers[layer][0], max(end, 2 * self._layers[layer][0].shape[1])),
                _grown(self._layers[layer][1], max(end, 2 * self._layers[layer][1].shape[1])),
            )
        for prompt, length in enumerate(self.lengths):
            self._layers[layer][0][prompt, length : length + rows] = key[prompt]
            self._layers[layer][1][prompt, length : length + rows] = value[prompt]

    def commit(self, counts: list[int]) -> None:
        """Let the first `counts[p]` appended rows of prompt p count as context."""
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]

    def rows(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, [prompts, room, kv_heads, head_dim], those not yet committed included."""
        return self._layers[layer]

    def packed(self, layer: int) -> KeyValue:
        """Keys and values of one layer, prompts end to end, `capacity` rows each."""
        key, value = self._layers[layer]
        return key.flatten(0, 1), value.flatten(0, 1)

    def keep(self, prompts: list[int]) -> None:
        """Drop all other prompts."""
        self.lengths = [self.lengths[p] for p in prompts]
        self._layers = [(key[prompts], value[prompts]) for key, value in self._layers]


def _grown(buffer: Tensor, rows: int) -> Tensor:
    grown = buffer.new_zeros(buffer.shape[0], rows, *buffer.shape[2:])
    grown[:, : buffer.shape[1]] = buffer
    return grown
