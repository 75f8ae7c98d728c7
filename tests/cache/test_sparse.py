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
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_equals_the_full_softmax_in_float64(chunk, softcap):
    hidden, head = case()
    ids, values = topk_logprobs(hidden, head, 7, chunk=chunk, softcap=softcap)
    logits = hidden.double() @ head.double().T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    exact = torch.log_softmax(logits, -1).topk(7)
    assert torch.equal(ids, exact.indices)
    torch.testing.assert_close(values.double(), exact.values, rtol=0, atol=5e-6)


def slow_order(row: torch.Tensor) -> list[int]:
    """All ids, most probable first, the smaller one where two are equal."""
    return sorted(range(len(row)), key=lambda i: (-float(row[i]), i))


@pytest.mark.parametrize("k", [1, 2, 5, 7, 64, 97])
@pytest.mark.parametrize("levels", [1, 2, 5, 40])
@pytest.mark.parametrize("chunk", [4, 1000])
def test_of_equally_probable_tokens_the_smaller_id_comes_first(k, levels, chunk):
    logits = torch.randint(levels, (23, 97), generator=torch.Generator().manual_seed(levels)).float()
    ids, values = topk_logprobs(logits, torch.eye(97), k, chunk=chunk)  # the hidden states are the logits
    assert torch.equal(ids[:, 0], logits.argmax(-1))
    exact = torch.log_softmax(logits, -1)
    for row, found, said, logprobs in zip(logits, ids.tolist(), values, exact, strict=True):
        order = slow_order(row)
        assert len(set(found)) == k
        assert found[0] == order[0]
        # Which tokens that tie with the last one are kept is open; they stand in order, too.
        above = sum(float(row[i]) > float(row[found[-1]]) for i in found)
        assert found[:above] == order[:above]
        if k == 97 or row[order[k]] < row[order[k - 1]]:
            assert found == order[:k]
        assert found == sorted(found, key=lambda i: (-float(row[i]), i))
        torch.testing.assert_close(said, logprobs[found], rtol=0, atol=5e-6)
        torch.testing.assert_close(said, logprobs[order[:k]], rtol=0, atol=5e-6)


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


@pytest.mark.parametrize("top_p", [0.0, 1e-9])
def test_keep_mass_never_leaves_out_the_first_entry(top_p):
    exact = torch.tensor([0.5, 0.3, 0.2]).log().expand(2, 3)
    assert torch.isfinite(keep_mass(exact, top_p)).tolist() == [[True, False, False]] * 2
