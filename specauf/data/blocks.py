"""From documents to a batch of blocks: which anchors, and what each slot is compared with."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Int

from specauf.cache import Document
from specauf.data.batch import BlockBatch, BlockTargets


def eligible_anchors(loss_mask: Bool[np.ndarray, " tokens"]) -> Int[np.ndarray, " anchors"]:
    """Positions a block may be anchored at: a supervised token whose next token is supervised too.

    At inference the first anchor is the first answer token (the target's prefill gives it), so prompt tokens never
    anchor a block (DFlash, arXiv 2602.06036; the rule of every public trainer).
    """
    both = loss_mask[:-1] & loss_mask[1:]
    both[:1] = False  # a block needs context before its anchor
    return np.flatnonzero(both)


def sample_anchors(
    loss_mask: Bool[np.ndarray, " tokens"], count: int, rng: np.random.Generator
) -> Int[np.ndarray, " anchors"]:
    """At most `count` distinct eligible anchors, uniformly, sorted."""
    eligible = eligible_anchors(loss_mask)
    if len(eligible) <= count:
        return eligible
    return np.sort(rng.choice(eligible, count, replace=False))


def make_block_batch(
    documents: Sequence[Document],
    *,
    block_size: int,
    anchors_per_document: int,
    seed: int,
    epoch: int,
    teacher: bool = False,
    features: bool = True,
    feature_dtype: torch.dtype | None = None,
) -> BlockBatch:
    """Pack documents end to end and lay blocks over them.

    The anchors of a document depend on (seed, epoch, its number) alone, so neither the batch it falls into nor the
    number of ranks or workers changes them.

    Args:
        documents: what to pack; each must have at least one eligible anchor to contribute a block.
        block_size: slots of a block, the anchor's own included.
        anchors_per_document: blocks to draw from each document; fewer when it has fewer eligible positions.
        seed: of the run.
        epoch: anchors are drawn anew in each.
        teacher: also gather the target's top-k for every slot.
        features: also pack the features.
        feature_dtype: of the packed features; as they are read when None.
    """
    offsets = np.concatenate([[0], np.cumsum([len(d.tokens) for d in documents])])
    anchors, owner, targets = [], [], []
    for number, document in enumerate(documents):
        rng = np.random.default_rng((seed, epoch, document.index))
        local = sample_anchors(document.loss_mask, anchors_per_document, rng)
        anchors.append(local + offsets[number])
        owner.append(np.full(len(local), number))
        targets.append(block_targets(document, local, block_size, teacher=teacher))
    packed = torch.from_numpy(np.concatenate([d.training_features for d in documents])) if features else None
    return BlockBatch(
        tokens=torch.from_numpy(np.concatenate([d.tokens for d in documents]).astype(np.int64)),
        doc_offsets=torch.from_numpy(offsets.astype(np.int64)),
        features=packed if packed is None or feature_dtype is None else packed.to(feature_dtype),
        anchors=torch.from_numpy(np.concatenate(anchors).astype(np.int64)),
        anchor_doc=torch.from_numpy(np.concatenate(owner).astype(np.int64)),
        targets=_concatenate(targets),
        doc_ids=tuple(int(d.index) for d in documents),
    )


def block_targets(
    document: Document, anchors: Int[np.ndarray, " anchors"], block_size: int, *, teacher: bool
) -> BlockTargets:
    """Labels, validity and (with `teacher`) the target's top-k for slots 1..B-1 of each anchor of one document."""
    position = anchors[:, None] + np.arange(1, block_size)
    inside = position < len(document.tokens)
    position = np.where(inside, position, 0)
    valid = inside & document.loss_mask[position]
    labels = np.where(valid, document.tokens[position], 0).astype(np.int64)
    targets = BlockTargets(torch.from_numpy(labels), torch.from_numpy(valid))
    if not teacher:
        return targets
    assert document.topk_ids is not None, "the document was read without top-k"
    assert document.topk_logprobs is not None
    assert document.head_mass is not None
    # Row t describes the token at t+1, so slot k reads row anchor+k-1; rows are kept only where supervised.
    row_of = np.zeros(len(document.tokens), np.int64)
    row_of[document.row_index] = np.arange(len(document.row_index))
    row = row_of[np.where(valid, position - 1, document.row_index[0])]
    return BlockTargets(
        labels=targets.labels,
        valid=targets.valid,
        teacher_ids=torch.from_numpy(document.topk_ids[row].astype(np.int64)),
        teacher_logprobs=torch.from_numpy(document.topk_logprobs[row].astype(np.float32)),
        head_mass=torch.from_numpy(document.head_mass[row].astype(np.float32)),
    )


def _concatenate(parts: Sequence[BlockTargets]) -> BlockTargets:
    return BlockTargets(
        torch.cat([p.labels for p in parts]),
        torch.cat([p.valid for p in parts]),
        _cat_present([p.teacher_ids for p in parts]),
        _cat_present([p.teacher_logprobs for p in parts]),
        _cat_present([p.head_mass for p in parts]),
    )


def _cat_present(parts: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """All parts one after another; None when any is missing."""
    present = [p for p in parts if p is not None]
    return torch.cat(present) if len(present) == len(parts) else None
