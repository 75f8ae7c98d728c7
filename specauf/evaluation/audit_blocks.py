"""Blocks of cached documents as a drafter fills them: at training's random anchors and at those decoding visits."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from specauf.cache import Document
from specauf.data.batch import BlockBatch, BlockTargets
from specauf.data.blocks import block_targets, sample_anchors
from specauf.decoding.replay import Replay, answers, groups, replay
from specauf.drafters import Drafter, TargetVocabulary
from specauf.errors import UserError

GROUP_TOKENS = 4096  # documents that share replay's passes: a large target's features take 80 kB a token


@dataclass(frozen=True)
class Blocks:
    """What a drafter drafted in some blocks, slot by slot, each slot as if all before it had been accepted.

    Attributes:
        labels: the cached tokens.
        valid: the slot lies in the answer, and so do all before it.
        drafted: argmaxes; -1 where nothing was computed, behind a block's first wrong draft.
        confidence: the drafter's probability of its argmax.
        loss: cross-entropy of the cached token, in nats.
        stated: what the drafter's confidence head says of the slot; NaN where it has none, or nothing was computed.
    """

    labels: Int[Tensor, "blocks slots"]
    valid: Bool[Tensor, "blocks slots"]
    drafted: Int[Tensor, "blocks slots"]
    confidence: Float[Tensor, "blocks slots"]
    loss: Float[Tensor, "blocks slots"]
    stated: Float[Tensor, "blocks slots"]

    @property
    def correct(self) -> Bool[Tensor, "blocks slots"]:
        """Drafted what the cache holds."""
        return (self.drafted == self.labels) & self.valid

    @property
    def reached(self) -> Bool[Tensor, "blocks slots"]:
        """Slots that decoding looks at: the accepted ones and the first that fails."""
        before = self.correct.long().cumprod(-1).roll(1, -1)
        before[:, :1] = 1
        return before.bool() & self.valid

    @property
    def accepted(self) -> Int[Tensor, " blocks"]:
        """A of each block."""
        return self.correct.long().cumprod(-1).sum(-1)


@torch.no_grad()
def observe(
    drafter: Drafter,
    vocabulary: TargetVocabulary,
    document: Document,
    anchors: Int[np.ndarray, " anchors"],
    *,
    every_slot: bool = True,
) -> Blocks:
    """What the drafter drafts at some positions of one document.

    Args:
        drafter: servable, in evaluation mode.
        vocabulary: the target's, whole.
        document: read with features if the drafter needs them; of a sketch its reconstruction is taken.
        anchors: positions of block anchors.
        every_slot: also run the head on slots behind the first wrong draft.
    """
    targets = block_targets(document, anchors, drafter.config.block_size, teacher=False)
    targets = BlockTargets(targets.labels, targets.valid.cumprod(-1).bool())
    tokens = torch.from_numpy(document.tokens.astype(np.int64))
    features = None
    if drafter.needs_features:
        assert document.features is not None
        features = torch.from_numpy(document.features)
    batch = BlockBatch(
        tokens=tokens,
        doc_offsets=torch.tensor([0, len(tokens)]),
        features=features,
        anchors=torch.from_numpy(anchors.astype(np.int64)),
        anchor_doc=torch.zeros(len(anchors), dtype=torch.int64),
        targets=targets,
    )
    rows = drafter(batch, vocabulary)
    labels, valid = targets.labels, targets.valid
    drafted, confidence = torch.full_like(labels, -1), torch.zeros(labels.shape)
    loss, stated, at = torch.zeros(labels.shape), torch.full(labels.shape, torch.nan), torch.arange(len(anchors))
    for slot in range(rows.shape[1]):
        at = at[valid[at, slot]]
        if not len(at):
            break
        logits, column = drafter.slot_draft(rows, slot, at, tokens[batch.anchors], labels, vocabulary)
        log_probs = logits.float().log_softmax(-1)
        drafted[at, slot] = column
        confidence[at, slot] = log_probs.gather(1, column[:, None])[:, 0].exp()
        said = drafter.slot_confidence(rows, slot, at, tokens[batch.anchors], labels)
        if said is not None:
            stated[at, slot] = said.float()
        loss[at, slot] = -log_probs.gather(1, labels[at, slot, None])[:, 0]
        if not every_slot:
            at = at[drafted[at, slot] == labels[at, slot]]
    return Blocks(labels, valid, drafted, confidence, loss, stated)


def join(parts: Sequence[Blocks]) -> Blocks:
    """Blocks of several documents as one."""
    return Blocks(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Blocks)))


def visited(document: Document, cycles: Replay) -> Int[np.ndarray, " anchors"]:
    """Anchors of the cycles that replay went through."""
    anchors, number = [], 0
    for start, end in answers(document.loss_mask):
        at = start
        while at < end - 1:
            anchors.append(at)
            at += int(cycles.accepted[number]) + 1
            number += 1
    return np.array(anchors, np.int64)


@dataclass(frozen=True)
class Observed:
    """Everything the audit looks at.

    Attributes:
        training: blocks at random anchors, as training draws them.
        decoding: blocks at the anchors that greedy decoding visits.
        accepted: A of every cycle of each document.
        as_evaluated: the same in the blocks that an evaluation decoded in.
    """

    training: Blocks
    decoding: Blocks
    accepted: list[list[int]]
    as_evaluated: list[list[int]]


def observe_documents(
    drafter: Drafter,
    vocabulary: TargetVocabulary,
    documents: Iterable[Document],
    anchors_per_document: int,
    seed: int,
    evaluated_block: int | None = None,
) -> Observed:
    """Both views of some documents; those without a block are left out.

    Args:
        drafter: servable, in evaluation mode.
        vocabulary: the target's, whole.
        documents: read with features if the drafter needs them.
        anchors_per_document: blocks that training would draw from each.
        seed: of the anchors.
        evaluated_block: slots of the blocks that an evaluation decoded in; the trained number when None.

    Raises:
        UserError: none of them has a block.
    """
    training, decoding, accepted, as_evaluated = [], [], [], []
    for group in groups(documents, GROUP_TOKENS):
        cycles = replay(drafter, vocabulary, group)
        as_trained = evaluated_block in (None, drafter.config.block_size)
        shorter = cycles if as_trained else replay(drafter, vocabulary, group, block_size=evaluated_block)
        for document, whole, short in zip(group, cycles, shorter, strict=True):
            rng = np.random.default_rng((seed, 0, document.index))
            drawn = sample_anchors(document.loss_mask, anchors_per_document, rng)
            seen = visited(document, whole)
            if not len(drawn) or not len(seen):
                continue
            training.append(observe(drafter, vocabulary, document, drawn))
            decoding.append(observe(drafter, vocabulary, document, seen, every_slot=False))
            accepted.append(whole.accepted.tolist())
            as_evaluated.append(short.accepted.tolist())
    if not training:
        raise UserError("documents: none of those chosen has two supervised tokens, so there is no block: choose more")
    return Observed(join(training), join(decoding), accepted, as_evaluated)
