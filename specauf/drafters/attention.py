"""Block attention: every block sees the context strictly before its anchor, and its own slots in both directions.

Keys and values of the context and of the blocks come apart, because all blocks of a document share the context's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from specauf.errors import UserError

AttentionKind = Literal["auto", "sdpa", "flex"]


@dataclass(frozen=True)
class BlockLayout:
    """Where each block's context lies in the packed context rows.

    Attributes:
        starts: first context row of each block's document.
        lengths: number of context rows the block sees: starts[n] .. starts[n] + lengths[n] - 1.
        on_host: both as lists, where they are known without asking the device.
    """

    starts: Int[Tensor, " blocks"]
    lengths: Int[Tensor, " blocks"]
    on_host: tuple[Sequence[int], Sequence[int]] | None = None

    @cached_property
    def groups(self) -> tuple[tuple[int, int, int, int], ...]:
        """(first block, end block, first context row, longest context) of each run of blocks with one document."""
        starts, lengths = self.on_host or (self.starts.tolist(), self.lengths.tolist())
        groups: list[tuple[int, int, int, int]] = []
        for n, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            if groups and groups[-1][2] == start:
                first, _, _, longest = groups[-1]
                groups[-1] = (first, n + 1, start, max(longest, length))
            else:
                groups.append((n, n + 1, start, length))
        return tuple(groups)


@runtime_checkable
class Attend(Protocol):
    """Attention of blocks over shared context rows and their own slots."""

    def __call__(
        self,
        query: Float[Tensor, "blocks queries heads head_dim"],
        context_key: Float[Tensor, "tokens kv_heads head_dim"],
        context_value: Float[Tensor, "tokens kv_heads head_dim"],
        block_key: Float[Tensor, "blocks block kv_heads head_dim"],
        block_value: Float[Tensor, "blocks block kv_heads head_dim"],
    ) -> Float[Tensor, "blocks queries heads head_dim"]:
        """Attend."""
        ...


class SdpaAttend:
    """One `scaled_dot_product_attention` per document over its own context: nothing is computed only to be masked away.

    Query heads that share a key head are folded into the query rows, which spares the repetition of keys.
    """

    def __init__(self, layout: BlockLayout) -> None:
        self.layout = layout

    def __call__(
        self,
        query: Float[Tensor, "blocks queries heads head_dim"],
        context_key: Float[Tensor, "tokens kv_heads head_dim"],
        context_value: Float[Tensor, "tokens kv_heads head_dim"],
        block_key: Float[Tensor, "blocks block kv_heads head_dim"],
        block_value: Float[Tensor, "blocks block kv_heads head_dim"],
    ) -> Float[Tensor, "blocks queries heads head_dim"]:
        """Attend, document by document."""
        blocks, queries, heads, head_dim = query.shape
        kv_heads = block_key.shape[2]
        share = heads // kv_heads
        folded = query.view(blocks, queries, kv_heads, share, head_dim).permute(0, 2, 1, 3, 4)
        folded = folded.reshape(blocks, kv_heads, queries * share, head_dim)
        parts = []
        for first, end, start, longest in self.layout.groups:
            n, rows = end - first, slice(start, start + longest)
            key = torch.cat([context_key[rows].expand(n, -1, -1, -1), block_key[first:end]], 1).transpose(1, 2)
            value = torch.cat([context_value[rows].expand(n, -1, -1, -1), block_value[first:end]], 1).transpose(1, 2)
            parts.append(
                F.scaled_dot_product_attention(
                    folded[first:end], key, value, attn_mask=self._mask(first, end, longest, block_key.shape[1])
                )
            )
        out = torch.cat(parts).view(blocks, kv_heads, queries, share, head_dim).permute(0, 2, 1, 3, 4)
        return out.reshape(blocks, queries, heads, head_dim)

    def _mask(self, first: int, end: int, longest: int, block: int) -> Tensor | None:
        if end - first == 1:
            return None
        lengths = self.layout.lengths[first:end, None]
        column = torch.arange(longest + block, device=lengths.device)
        return ((column < lengths) | (column >= longest))[:, None, None, :]


def training_attend(layout: BlockLayout, kind: AttentionKind = "auto") -> Attend:
    """The attention that training uses: of its own accord FlexAttention on CUDA, and one SDPA a document elsewhere.

    Raises:
        UserError: FlexAttention is asked for where it has no gradients.
    """
    device = layout.starts.device.type
    if kind == "flex" and device in ("cpu", "mps") and torch.is_grad_enabled():
        raise UserError(
            f"model.drafter.init_args.attention is flex but this trains on {device}, where FlexAttention has no "
            "gradients: give auto or sdpa"
        )
    if kind == "flex" or (kind == "auto" and layout.starts.is_cuda):
        from specauf.drafters.flex import FlexAttend  # its import alone costs a second, and a CPU never needs it

        return FlexAttend(layout)
    return SdpaAttend(layout)
