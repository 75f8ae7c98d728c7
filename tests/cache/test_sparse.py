"""Sparse distributions of the target: exact against float64, in any chunking."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cache_builder.sparse import keep_mass, topk_logprobs
from specauf.errors import UserError


def case(rows: int = 23, vocabulary: int = 97, hidden: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, hidden, generator=generator), 2 * torch.randn(vocabulary, hidden, generator=generator)


@pytest.mark.parametrize("chunk", [1, 5, 23, 1000])
@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (3.0, 1.0), (None, 0.25), (2.0, 0.5)])
def test_equals_the_full_softmax_in_float64(chunk, softcap, scale):
    hidden, head = case()
    ids, values = topk_logprobs(hidden, head, 7, chunk=chunk, softcap=softcap, scale=scale)
    logits = scale * (hidden.double() @ head.double().T)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    exact = torch.log_softmax(logits, -1).topk(7)
    assert torch.equal(ids, exact.indices)
    torch.testing.assert_close(values.double(), exact.values, rtol=0, atol=5e-6)


def test_the_whole_vocabulary_holds_all_mass():
    hidden, head = case()
    _, values = topk_logprobs(hidden, head, 97)
    torch.testing.assert_close(values.exp().sum(-1), torch.ones(23))


def test_no_rows():
    ids, values = topk_logprobs(torch.zeros(0, 6), case()[1], 3)
    assert ids.shape == values.shape == (0, 3)


@pytest.mark.parametrize("k", [0, 98])
def test_k_outside_the_vocabulary(k):
    with pytest.raises(UserError, match=f"k is {k}, the target's vocabulary has 97"):
        topk_logprobs(*case(), k)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_from_the_target(bad):
    hidden, head = case()
    hidden[3, 1] = bad
    with pytest.raises(UserError, match="NaN or Inf"):
        topk_logprobs(hidden, head, 4, chunk=2)


@given(st.integers(0, 2**32 - 1), st.floats(0.01, 1.0))
def test_keep_mass_keeps_the_fewest_entries_that_reach_it(seed, top_p):
    logits = torch.from_numpy(np.random.default_rng(seed).normal(0, 3, (4, 20)))
    exact = torch.log_softmax(logits, -1).sort(-1, descending=True).values[:, :8]
    kept = keep_mass(exact, top_p)
    for row, all_of_it in zip(kept, exact, strict=True):
        count = int(torch.isfinite(row).sum())
        assert torch.equal(row[:count], all_of_it[:count])
        assert count >= 1
        assert all_of_it[: count - 1].exp().sum() < top_p
        if count < 8:
            assert all_of_it[:count].exp().sum() >= top_p - 1e-12
