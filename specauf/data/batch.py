"""The two records that flow from the cache to the drafter and the loss."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class BlockTargets:
    """What the loss compares with: one row per block, one column per drafted slot k = 1..B-1.

    Attributes:
        labels: data token at anchor+k; 0 where not valid.
        valid: the slot lies inside the document and is supervised. May have holes: objectives end a block at the
            first invalid slot (contiguous-prefix rule).
        teacher_ids: the target's top-k token ids for the slot (cache row anchor+k-1), most probable first; None when
            the objective does not ask for them.
        teacher_logprobs: their log-probabilities in nats, absolute (normalised over the whole vocabulary).
        head_mass: probability the top-k entries hold together; 1 - head_mass is the tail.
    """

    labels: Int[Tensor, "blocks slots"]
    valid: Bool[Tensor, "blocks slots"]
    teacher_ids: Int[Tensor, "blocks slots k"] | None = None
    teacher_logprobs: Float[Tensor, "blocks slots k"] | None = None
    head_mass: Float[Tensor, "blocks slots"] | None = None

    def __getitem__(self, rows: slice | Tensor) -> "BlockTargets":
        """The targets of some blocks, by slice, mask or indices."""
        return self._each(lambda value: value[rows])

    def to(self, device: torch.device | str) -> "BlockTargets":
        """The same on another device; on its way there, when it is pinned and the device a GPU."""
        return self._each(lambda value: _moved(value, device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "BlockTargets":
        optional = (self.teacher_ids, self.teacher_logprobs, self.head_mass)
        return BlockTargets(
            change(self.labels), change(self.valid), *(None if value is None else change(value) for value in optional)
        )


@dataclass(frozen=True)
class BlockBatch:
    """A batch of blocks over packed documents: documents lie end to end, no padding.

    Attributes:
        tokens: all tokens of the batch's documents.
        doc_offsets: document d is tokens[doc_offsets[d]:doc_offsets[d+1]].
        features: the target's features (or their sketch) of each token; None for drafters that read tokens only.
        anchors: index into `tokens` of each block's anchor, sorted. Slot k of block n stands at anchors[n] + k.
        anchor_doc: document of each block. Padding blocks have every slot invalid.
        targets: what the loss compares with.
        doc_ids: the cache's number of each document, for messages.
    """

    tokens: Int[Tensor, " tokens"]
    doc_offsets: Int[Tensor, " docs_plus_1"]
    features: Float[Tensor, "tokens features"] | None
    anchors: Int[Tensor, " blocks"]
    anchor_doc: Int[Tensor, " blocks"]
    targets: BlockTargets
    doc_ids: tuple[int, ...] = ()

    def to(self, device: torch.device | str) -> "BlockBatch":
        """The same on another device; on its way there, when it is pinned and the device a GPU."""
        return self._each(lambda value: _moved(value, device))

    def pin_memory(self) -> "BlockBatch":
        """The same in memory that a GPU can fetch from; Lightning's and torch's name for it."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "BlockBatch":
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: dict[str, Any] = {k: change(v) if isinstance(v, Tensor) else v for k, v in values.items()}
        return BlockBatch(**changed | {"targets": self.targets._each(change)})

    def with_targets(self, targets: BlockTargets) -> "BlockBatch":
        """The same blocks with other targets."""
        return replace(self, targets=targets)


def _moved(value: Tensor, device: torch.device | str) -> Tensor:
    # Not towards the CPU, which could read before the numbers are there.
    return value.to(device, non_blocking=torch.device(device).type == "cuda")
