"""Replay of cached greedy answers equals real greedy decoding, cycle by cycle."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from specauf.decoding import replay, speculative_generate
from specauf.decoding.replay import answers
from specauf.errors import UserError
from tests.drafters.tiny import document, tiny_dflash, tiny_target, vocabulary_of


def trained_a_little(target, documents, steps=10):
    """A drafter that accepts some tokens and not others."""
    from tests.drafters.tiny import batch_of

    drafter, vocabulary = tiny_dflash(target).train(), vocabulary_of(target)
    batch = batch_of(documents, [[i for i in range(len(d.tokens)) if d.loss_mask[i]][:-1] for d in documents])
    optimizer = torch.optim.Adam(drafter.parameters(), 3e-3)
    for _ in range(steps):
        logits = vocabulary.logits(drafter(batch, vocabulary))[batch.targets.valid]
        torch.nn.functional.cross_entropy(logits, batch.targets.labels[batch.targets.valid]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return drafter.eval()


def test_a_replay_that_cannot_be_leaves_the_drafter_in_training():
    target = tiny_target()
    drafter, vocabulary = tiny_dflash(target).train(), vocabulary_of(target)
    for block in (1, drafter.config.block_size + 1):
        with pytest.raises(UserError, match=f"block_size: {block} found"):
            replay(drafter, vocabulary, [], block_size=block)
    document = SimpleNamespace(tokens=np.arange(9), loss_mask=np.arange(9) > 4, features=None, sketch=None)
    with pytest.raises(UserError, match="features: none of"):
        replay(drafter, vocabulary, [document])
    assert drafter.training


@pytest.mark.parametrize("block_size", [None, 3])
def test_replay_equals_real_decoding_cycle_by_cycle(block_size):
    target = tiny_target()
    documents = [
        document(target, length, new, seed) for seed, (length, new) in enumerate([(5, 30), (1, 7), (9, 24), (4, 1)])
    ]
    drafter = trained_a_little(target, documents)
    results = replay(drafter, vocabulary_of(target), documents, block_size=block_size, max_tokens=45)
    accepted = []
    for d, (found, slots) in zip(documents, results, strict=True):
        ids = torch.from_numpy(d.tokens[~d.loss_mask])
        real = speculative_generate(
            target, drafter, ids, max_new_tokens=int(d.loss_mask.sum()), block_size=block_size, stop_token_ids=[]
        )
        assert real.tokens == d.tokens[d.loss_mask].tolist()
        assert found.tolist() == real.accepted
        assert slots.tolist() == real.drafted
        accepted += real.accepted
    assert 0 < np.mean(accepted) < (block_size or 6) - 1  # neither trivially right nor wrong


def test_each_supervised_span_is_an_answer_of_its_own():
    assert answers(np.array([False, True, True, False, True])) == [(1, 3), (4, 5)]
    assert answers(np.array([True, True])) == [(0, 2)]
    assert answers(np.array([False])) == []
    target = tiny_target()
    d = document(target, 5, 20)
    mask = d.loss_mask.copy()
    mask[12:15] = False
    [(accepted, slots)] = replay(tiny_dflash(target), vocabulary_of(target), [dataclasses.replace(d, loss_mask=mask)])
    # 7 tokens in the first span and 10 in the second; each span's first comes with the prompt's pass.
    assert int((accepted + 1).sum()) in (15, 16, 17)
    assert int(slots.max()) == 5


def test_replay_refuses_documents_without_the_drafters_features():
    target = tiny_target()
    d = document(target, 5, 20)
    with pytest.raises(UserError, match="features: none of 64 numbers"):
        replay(tiny_dflash(target), vocabulary_of(target), [dataclasses.replace(d, features=None)])
    with pytest.raises(UserError, match="features: none of 10 numbers"):
        replay(tiny_dflash(target, feature_dim=10), vocabulary_of(target), [d])


def test_a_reduced_head_replays_what_it_would_decode():
    target = tiny_target()
    documents = [document(target, 5, 30)]
    drafter = trained_a_little(target, documents)
    vocabulary = vocabulary_of(target).restrict(torch.unique(torch.from_numpy(documents[0].tokens))[::2])
    [(accepted, _)] = replay(drafter, vocabulary, documents)
    ids = torch.from_numpy(documents[0].tokens[:5])
    real = speculative_generate(target, drafter, ids, max_new_tokens=30, vocabulary=vocabulary)
    assert accepted.tolist() == real.accepted
