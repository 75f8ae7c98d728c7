"""Block attention with FlexAttention, for CUDA: one fused kernel over all documents and blocks of a batch.

Context rows and block slots are laid end to end as one row of keys; a block mask says which tiles hold anything to see,
and tiles without are never computed. Lengths are padded to whole tiles, so that ragged batches share few shapes.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from specauf.drafters.attention import BlockLayout

TILE = 128
"""Rows and columns of a tile; lengths are padded to a multiple."""
LEAST_WIDTH = 16
"""Of a head, on CUDA; narrower ones, as tiny models for tests have them, are padded with zeros."""


@cache
def compiled() -> Callable[..., Any]:
    """FlexAttention's kernel, compiled once per process for lengths that vary."""
    return torch.compile(flex_attention, dynamic=True)


class FlexAttend:
    """See `Attend`: the same result as `SdpaAttend`, from FlexAttention.

    Args:
        layout: which context rows each block sees.
        kernel: FlexAttention, compiled or not.
    """

    def __init__(self, layout: BlockLayout, kernel: Callable[..., Any] | None = None) -> None:
        self.layout = layout
        self.kernel = kernel or compiled()
        self._masks: dict[tuple[int, int, int], BlockMask] = {}

    def __call__(
        self,
        query: Float[Tensor, "blocks queries heads head_dim"],
        context_key: Float[Tensor, "tokens kv_heads head_dim"],
        context_value: Float[Tensor, "tokens kv_heads head_dim"],
        block_key: Float[Tensor, "blocks block kv_heads head_dim"],
        block_value: Float[Tensor, "blocks block kv_heads head_dim"],
    ) -> Float[Tensor, "blocks queries heads head_dim"]:
        """Attend, all blocks at once."""
        blocks, queries, heads, head_dim = query.shape
        tokens, block = len(context_key), block_key.shape[1]
        # Blocks start at a whole tile, so that the tiles of the context depend on the context alone.
        room, wide = _whole(tokens), max(head_dim, LEAST_WIDTH)
        key, value = (
            torch.cat([_padded(context, room, wide), _padded(own.flatten(0, 1), _whole(blocks * block), wide)])
            for context, own in ((context_key, block_key), (context_value, block_value))
        )
        # The kernel divides by the square root of the padded width.
        scaled = query if wide == head_dim else query * (wide / head_dim) ** 0.5
        rows = _padded(scaled.flatten(0, 1), _whole(blocks * queries), wide)
        out = self.kernel(
            rows.transpose(0, 1)[None],
            key.transpose(0, 1)[None],
            value.transpose(0, 1)[None],
            block_mask=self._mask(queries, block, room),
            enable_gqa=heads != block_key.shape[2],
        )
        return out[0].transpose(0, 1)[: blocks * queries, :, :head_dim].reshape(blocks, queries, heads, head_dim)

    def _mask(self, queries: int, block: int, room: int) -> BlockMask:
        """The block mask for some queries a block; layers share it."""
        found = self._masks.get((queries, block, room))
        if found is not None:
            return found
        starts, ends = self.layout.starts, self.layout.starts + self.layout.lengths
        if len(starts) == 1:  # a length of 1 would be compiled for itself; the second block only fills the tile
            starts, ends = starts.repeat(2), ends.repeat(2)
        blocks, last = len(starts), len(starts) - 1

        # A lambda, because the run-time type checks of the tests wrap every `def`, which the kernel's tracer refuses.
        # Rows that only fill the last tile see column 0: a softmax over nothing is not a number.
        visible = lambda _batch, _head, row, column: torch.where(  # noqa: E731
            row // queries < blocks,
            (column >= starts[(row // queries).clamp(max=last)]) & (column < ends[(row // queries).clamp(max=last)])
            | (column >= room) & ((column - room) // block == row // queries),
            column == 0,
        )
        some, every = tiles(self.layout, queries, block, room)
        made = BlockMask.from_kv_blocks(*_listed(some), *_listed(every), BLOCK_SIZE=TILE, mask_mod=visible)
        self._masks[queries, block, room] = made
        return made


def tiles(
    layout: BlockLayout, queries: int, block: int, room: int
) -> tuple[Bool[Tensor, "rows columns"], Bool[Tensor, "rows columns"]]:
    """Tiles of which some is seen but not all, and tiles of which all is; no larger array is made than blocks x tiles.

    `create_block_mask` finds the same, from an array of all rows and columns: 100 GB where a batch has 16 documents of
    2,048 tokens and 512 anchors each.

    Args:
        layout: which context rows each block sees.
        queries: rows of each block.
        block: columns of each block's own slots, behind the context's.
        room: columns of the context, a multiple of TILE.
    """
    starts, ends, blocks = layout.starts[:, None], (layout.starts + layout.lengths)[:, None], len(layout.starts)
    row = TILE * torch.arange(_whole(blocks * queries) // TILE, device=starts.device)
    filled = row + TILE > blocks * queries  # its last rows belong to no block, and see column 0
    first, last = row // queries, ((row + TILE - 1) // queries).clamp(max=blocks - 1)

    left = TILE * torch.arange(room // TILE, device=starts.device)
    touched = (starts < ends) & (starts < left + TILE) & (ends > left)
    covered = (starts <= left) & (ends >= left + TILE)
    # How many blocks of each tile of rows touch and cover each tile of the context: differences of running sums.
    touching, covering = (F.pad(seen.long().cumsum(0), (0, 0, 1, 0)) for seen in (touched, covered))
    context = touching[last + 1] > touching[first]
    whole = (covering[last + 1] - covering[first] == (last - first + 1)[:, None]) & ~filled[:, None]

    own = TILE * torch.arange(_whole(blocks * block) // TILE, device=starts.device)
    from_block, to_block = own // block, (own + TILE - 1) // block
    slots = (from_block <= last[:, None]) & (to_block >= first[:, None])
    alone = slots & (from_block == to_block) & (first == last)[:, None] & ~filled[:, None]

    seen, all_seen = torch.cat([context, slots], 1), torch.cat([whole, alone], 1)
    seen[:, 0] |= filled
    return seen & ~all_seen, all_seen


def _listed(chosen: Bool[Tensor, "rows columns"]) -> tuple[Int[Tensor, "1 1 rows"], Int[Tensor, "1 1 rows columns"]]:
    """How many tiles each row has, and their numbers first, as BlockMask wants them."""
    order = chosen.int().argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32)[None, None], order.int()[None, None]


def _whole(length: int) -> int:
    return -(-length // TILE) * TILE


def _padded(x: Float[Tensor, "rows heads head_dim"], rows: int, wide: int) -> Float[Tensor, "padded heads wide"]:
    return F.pad(x, (0, wide - x.shape[-1], 0, 0, 0, rows - len(x)))
