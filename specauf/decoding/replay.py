"""Exact greedy speculative decoding of cached answers, without the target.

When the target itself wrote an answer greedily, its tokens are what greedy verification would commit. So replaying
blocks from the answer's start, moving on by A + 1, goes through the very cycles of real decoding.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from specauf.data.batch import BlockBatch, BlockTargets
from specauf.drafters.attention import BlockLayout, SdpaAttend
from specauf.drafters.base import Drafter
from specauf.drafters.vocabulary import TargetVocabulary
from specauf.errors import UserError


@runtime_checkable
class Answered(Protocol):
    """What replay reads of a document; `specauf.cache.Document` is one."""

    @property
    def tokens(self) -> Int[np.ndarray, " tokens"]:
        """Token ids."""
        ...

    @property
    def loss_mask(self) -> Bool[np.ndarray, " tokens"]:
        """True where an answer's token stands."""
        ...

    @property
    def features(self) -> Float[np.ndarray, "tokens features"] | None:
        """Raw features."""
        ...

    @property
    def sketch(self) -> Float[np.ndarray, "tokens rank"] | None:
        """The features' sketch."""
        ...


Doc = TypeVar("Doc", bound=Answered)


class Replay(NamedTuple):
    """The cycles of one document.

    Attributes:
        accepted: A of each cycle.
        slots: drafted slots that lay inside the answer; fewer than a block's only at its end.
    """

    accepted: Int[Tensor, " cycles"]
    slots: Int[Tensor, " cycles"]


@torch.no_grad()
def replay(
    drafter: Drafter,
    vocabulary: TargetVocabulary,
    documents: Iterable[Answered],
    *,
    block_size: int | None = None,
    max_tokens: int = 16384,
) -> list[Replay]:
    """The cycles of every document, in order; every supervised span of a document is replayed as an answer.

    Args:
        drafter: raw, or trained on this cache's sketch.
        vocabulary: the target's; a reduced head drafts its tokens only.
        documents: of the cache.
        block_size: a shorter block than trained.
        max_tokens: documents of about so many tokens together share their passes.

    Raises:
        UserError: the documents have no features that fit the drafter, or the block is none of its.
    """
    block = drafter.config.block(block_size)
    training = drafter.training
    drafter.eval()
    try:
        return [one for group in groups(documents, max_tokens) for one in _replay(drafter, vocabulary, group, block)]
    finally:
        drafter.train(training)


def groups(documents: Iterable[Doc], max_tokens: int) -> Iterator[list[Doc]]:
    """Documents that share their passes: about so many tokens together."""
    group: list[Doc] = []
    for document in documents:
        if group and sum(len(d.tokens) for d in group) + len(document.tokens) > max_tokens:
            yield group
            group = []
        group.append(document)
    if group:
        yield group


def answers(loss_mask: Bool[np.ndarray, " tokens"]) -> list[tuple[int, int]]:
    """First and end position of each run of supervised tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], loss_mask, [False]]).astype(np.int8)))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


def _replay(
    drafter: Drafter, vocabulary: TargetVocabulary, documents: Sequence[Answered], block_size: int
) -> list[Replay]:
    device = drafter.norm.weight.device
    batch = _pack(documents, drafter).to(device)
    drafter.check(vocabulary, None if batch.features is None else batch.features.shape[1])
    context = drafter.encode(batch, vocabulary)
    spans = [(d, a, b) for d, document in enumerate(documents) for a, b in answers(document.loss_mask)]
    # Position of the last committed token; a span is over when that is its last token.
    at = [start for _, start, _ in spans]
    offsets = batch.doc_offsets.tolist()
    accepted: list[list[int]] = [[] for _ in documents]
    slots: list[list[int]] = [[] for _ in documents]
    steps = torch.arange(1, block_size, device=device)
    while going := [n for n, (_, _, end) in enumerate(spans) if at[n] < end - 1]:
        on_host = ([offsets[spans[n][0]] for n in going], [at[n] for n in going])
        starts, positions = (torch.tensor(values, device=device) for values in on_host)
        end = torch.tensor([spans[n][2] for n in going], device=device)
        anchors = batch.tokens[starts + positions]
        attend = SdpaAttend(BlockLayout(starts, positions, on_host))
        rows = drafter.block_rows(anchors, positions, context, attend, vocabulary, block_size)
        target_position = positions[:, None] + steps
        valid = target_position < end[:, None]
        labels = batch.tokens[(starts[:, None] + target_position).clamp(max=len(batch.tokens) - 1)]
        for n, count in zip(going, drafter.accepted(rows, anchors, labels, valid, vocabulary).tolist(), strict=True):
            document, _, stop = spans[n]
            accepted[document].append(count)
            slots[document].append(min(block_size - 1, stop - 1 - at[n]))
            at[n] += count + 1
    return [
        Replay(torch.tensor(a, dtype=torch.int64), torch.tensor(s, dtype=torch.int64))
        for a, s in zip(accepted, slots, strict=True)
    ]


def _pack(documents: Sequence[Answered], drafter: Drafter) -> BlockBatch:
    """Documents end to end with the features that the drafter reads."""
    tokens = torch.from_numpy(np.concatenate([d.tokens for d in documents]).astype(np.int64))
    offsets = torch.from_numpy(np.concatenate([[0], np.cumsum([len(d.tokens) for d in documents])]).astype(np.int64))
    features = None
    if drafter.needs_features:
        raw = drafter.config.feature_dim == drafter.config.raw_feature_dim
        parts = [d.features if raw else d.sketch for d in documents]
        present = [part for part in parts if part is not None]
        if len(present) < len(parts):
            raise UserError(
                f"features: none of {drafter.config.feature_dim} numbers a token in the cache's documents; "
                "use the cache that the drafter was trained on"
            )
        features = torch.from_numpy(np.concatenate(present).astype(np.float32))
    none = torch.zeros(0, dtype=torch.int64)
    targets = BlockTargets(none.view(0, 0), none.view(0, 0).bool())
    return BlockBatch(tokens, offsets, features, none, none, targets)
