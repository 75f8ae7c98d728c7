"""What every drafter must do: serve what it trained, learn one answer by heart, and take every loss it supports."""

from pathlib import Path

import pytest
import torch

from specauf.checkpoint import load_drafter
from specauf.data.batch import BlockBatch
from specauf.decoding import speculative_generate
from specauf.decoding.replay import replay
from specauf.drafters import ContextMemory, DFlashDrafter, Drafter, TargetVocabulary
from specauf.objectives import AcceptUntilFail, CrossEntropy, Objective, block_loss
from tests.drafters.tiny import (
    BLOCK,
    TAPS,
    VOCAB,
    TinyDocument,
    batch_of,
    document,
    prompt,
    tiny_drafter,
    tiny_target,
    vocabulary_of,
)

KINDS = ("dflash", "dflash2", "domino", "dspark", "dspark of own slots", "masked")


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_training_gives_the_logits_that_decoding_gives_at_every_anchor(kind: str, packed: bool):
    target = tiny_target()
    drafter, vocabulary = tiny_drafter(kind, target), vocabulary_of(target)
    documents = [document(target, 5, 12, 1), document(target, 1, 9, 2), document(target, 9, 3, 3)]
    # Every position with at least one context row, from a document's start to its last token.
    anchors = [list(range(1, len(d.tokens))) for d in documents]
    groups = [(documents, anchors)] if packed else [([d], [a]) for d, a in zip(documents, anchors, strict=True)]
    number = 0
    for some, positions in groups:
        branch = drafter.branches(batch_of(some, positions), vocabulary)[-1]
        trained = iter(branch.head(branch.rows))
        for d, own in zip(some, positions, strict=True):
            for anchor in own:
                inside = min(BLOCK - 1, len(d.tokens) - 1 - anchor)
                found = decoding_logits(drafter, vocabulary, d, anchor, inside)
                drafted = found.isfinite()  # of DFlash 2 the candidates alone
                assert bool((drafted.sum(-1) >= (5 if kind == "dflash2" else VOCAB)).all())
                torch.testing.assert_close(next(trained)[:inside][drafted], found[drafted], atol=1e-5, rtol=0)
                number += 1
    assert number == sum(map(len, anchors))


def decoding_logits(drafter: Drafter, vocabulary: TargetVocabulary, d: TinyDocument, anchor: int, slots: int):
    """Logits at one anchor as decoding sees them, made to draft the document's own tokens."""
    memory = ContextMemory(1)
    tokens = torch.from_numpy(d.tokens)[None]
    features = torch.from_numpy(d.features)[None] if drafter.needs_features else None
    for start in range(0, anchor, 4):
        # As after a verified block: more rows are given than count.
        end, given = min(start + 4, anchor), min(start + 6, len(d.tokens))
        more = None if features is None else features[:, start:given]
        drafter.remember(memory, tokens[:, start:given], more, [end - start], vocabulary)
    seen: list[torch.Tensor] = []
    labels = iter(tokens[0, anchor + 1 :].tolist() + [0] * BLOCK)

    def dictate(logits: torch.Tensor) -> tuple[torch.Tensor, None]:
        seen.append(logits[0].view(-1, logits.shape[-1]))
        # One slot at a time for a drafter that goes left to right, all at once for the others.
        chosen = [[next(labels) for _ in range(logits.shape[1])]] if logits.ndim == 3 else [next(labels)]
        return torch.tensor(chosen), None

    drafter.draft(memory, tokens[:, anchor], BLOCK - 1, vocabulary, dictate)
    return torch.cat(seen)[:slots]


def learn(drafter: Drafter, vocabulary: TargetVocabulary, batch: BlockBatch, steps: int, rate: float = 5e-3) -> float:
    """Train on one batch with AUF; the last loss of the branch that drafts."""
    objective = Objective(AcceptUntilFail(), CrossEntropy())
    optimizer = torch.optim.Adam(drafter.parameters(), lr=rate)
    drafter.train()
    value = float("inf")
    for step in range(steps):
        total = torch.zeros(())
        for branch in drafter.branches(batch, vocabulary, step / steps):
            out = block_loss(branch.rows, branch.head, batch.targets, objective)
            loss = out.numerator / out.denominator
            total, value = total + branch.weight * loss, loss.item()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        if value < 1e-2:
            break
    drafter.eval()
    return value


@pytest.mark.parametrize("kind", ["dflash", "dflash2", "domino", "dspark", "dspark of own slots"])
def test_a_drafter_learns_one_answer_by_heart_and_decodes_it_in_whole_blocks(kind: str, tmp_path: Path):
    target = tiny_target()
    # The prompt's pass gives the first token; five whole blocks follow.
    new = 1 + 5 * BLOCK
    d = document(target, 7, new, seed=3)
    assert len(set(d.tokens[7:].tolist())) > 10, "an answer that repeats itself shows nothing"
    drafter, vocabulary = tiny_drafter(kind, target), vocabulary_of(target)
    loss = learn(drafter, vocabulary, batch_of([d], [list(range(7, len(d.tokens) - 1))]), steps=400)
    assert loss < 0.02
    drafter.save_pretrained(tmp_path)
    again = load_drafter(tmp_path)
    assert again.name == kind.split()[0]
    ids = torch.from_numpy(d.tokens[None, :7])
    result = speculative_generate(target, again, ids, max_new_tokens=new, stop_token_ids=[])
    assert list(result.tokens) == d.tokens[7:].tolist()
    tau = 1 + sum(result.accepted) / len(result.accepted)
    assert tau >= 0.95 * BLOCK


@pytest.mark.parametrize("kind", KINDS)
def test_replay_goes_through_the_cycles_of_real_decoding(kind: str):
    target = tiny_target()
    drafter, vocabulary = tiny_drafter(kind, target), vocabulary_of(target)
    d = document(target, 7, 31, seed=3)
    # Half learnt, so that cycles are of all lengths.
    learn(drafter, vocabulary, batch_of([d], [list(range(7, 37))]), steps=25)
    result = speculative_generate(
        target, drafter, torch.from_numpy(d.tokens[None, :7]), max_new_tokens=31, stop_token_ids=[]
    )
    (cycles,) = replay(drafter, vocabulary, [d])
    assert len(set(result.accepted)) > 1
    # The last cycle of a replay ends with the answer, that of decoding may run over it.
    assert cycles.accepted.tolist()[:-1] == list(result.accepted)[: len(cycles.accepted) - 1]


@pytest.mark.parametrize("kind", KINDS)
def test_activation_checkpointing_changes_no_gradient(kind: str):
    target = tiny_target()
    drafter, vocabulary = tiny_drafter(kind, target).train(), vocabulary_of(target)
    batch = batch_of([document(target, 5, 12, 1), document(target, 3, 9, 2)], [[5, 8], [4]])
    gradients = []
    for drafter.activation_checkpointing in (False, True):
        drafter.zero_grad()
        branch = drafter.branches(batch, vocabulary)[-1]
        branch.head(branch.rows).square().sum().backward()
        gradients.append([p.grad.clone() for p in drafter.parameters() if p.grad is not None])
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_drafter_decodes_with_a_reduced_head(kind: str):
    target = tiny_target()
    # Candidates are of the kept tokens: where all are candidates, the rest of their logits is comparable.
    changes = {"selector_top_k": VOCAB} if kind == "dflash2" else {}
    drafter, vocabulary = tiny_drafter(kind, target, **changes), vocabulary_of(target)
    some = vocabulary.restrict(torch.arange(0, 61, 2))
    ids = prompt(6)[None]
    whole = speculative_generate(target, drafter, ids, max_new_tokens=20, stop_token_ids=[])
    memory = ContextMemory(1)
    features = torch.randn(1, 6, len(TAPS) * 32) if isinstance(drafter, DFlashDrafter) else None
    drafter.remember(memory, ids, features, [6], vocabulary)
    few = drafter.draft(memory, ids[:, -1], BLOCK - 1, some).tokens
    assert all(token % 2 == 0 for token in few[0].tolist())
    assert len(whole.tokens) == 20
    # The columns of the reduced head are those of the whole one, also behind the correction.
    batch = batch_of([document(target, 5, 12, 1)], [[5, 8]])
    full, cut = drafter.branches(batch, vocabulary)[-1], drafter.branches(batch, some)[-1]
    torch.testing.assert_close(cut.head(cut.rows), full.head(full.rows)[..., ::2])
