"""Quantised log-probabilities, mass and ids: round trips, bounds, and what they cost in KL."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specauf.cache import logprobs


def head(seed: int, rows: int, vocabulary: int, k: int, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Ids and exact log-probs of the k most probable of random distributions."""
    logits = np.random.default_rng(seed).normal(0, 1, (rows, vocabulary)) * temperature
    shifted = logits - logits.max(1, keepdims=True)
    exact = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    ids = np.argsort(-exact, axis=1, kind="stable")[:, :k]
    return ids, np.take_along_axis(exact, ids, 1)


def decoded(exact: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mass = logprobs.decode_head_mass(logprobs.encode_head_mass(np.exp(exact).sum(1)))
    return logprobs.decode_logprobs(logprobs.encode_logprobs(exact), mass), mass


@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(0, 30),
    vocabulary=st.integers(1, 400),
    k=st.integers(1, 64),
    temperature=st.floats(0, 40),
)
def test_error_stays_within_the_bound(seed, rows, vocabulary, k, temperature):
    _, exact = head(seed, rows, vocabulary, min(k, vocabulary), temperature)
    again, mass = decoded(exact)
    assert np.abs(again - exact).max(initial=0) <= logprobs.LOGPROB_ERROR_BOUND
    assert (np.diff(again, axis=1) <= 0).all(), "order, and so top-1, is kept"
    np.testing.assert_allclose(np.exp(again.astype(np.float64)).sum(1), mass, rtol=1e-5)
    np.testing.assert_allclose(mass, np.exp(exact).sum(1), atol=1 / 2048)


@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(0, 30), k=st.integers(1, 70), largest=st.integers(0, 65535))
def test_codes_come_back_from_their_differences(seed, rows, k, largest):
    codes = np.sort(np.random.default_rng(seed).integers(0, largest + 1, (rows, k)), axis=1)
    deltas = np.diff(codes, axis=1, prepend=0).astype(np.uint16)
    np.testing.assert_array_equal(logprobs._running_sums(deltas), codes)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0, 8.0])
def test_kl_over_the_kept_entries_is_small(temperature):
    _, exact = head(7, 500, 2000, 32, temperature)
    again, _ = decoded(exact)
    p = np.exp(exact)
    kept = (p * (exact - again)).sum(1)
    head_p, head_q = p / p.sum(1, keepdims=True), np.exp(again) / np.exp(again).sum(1, keepdims=True)
    normalised = (head_p * np.log(head_p / head_q)).sum(1)
    assert kept.mean() <= 5e-5
    assert normalised.mean() <= 1.7e-4, "flat rows, all below the knee: a uniform step of 1/16 nat, (1/16)^2 / 24"
    assert normalised.min() >= -1e-6


def test_entries_that_a_row_does_not_have():
    exact = np.log(np.array([[0.5, 0.25, 0.125], [0.9, 1e-300, 1e-300], [1.0, 1e-300, 1e-300]]))
    exact[exact < -600] = -np.inf
    again, mass = decoded(exact)
    np.testing.assert_array_equal(np.isneginf(again), np.isneginf(exact))
    np.testing.assert_allclose(again[:, 0], exact[:, 0], atol=0.005)
    assert mass[2] == 1.0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=50))
def test_mass_keeps_small_tails_and_small_heads(values):
    exact = np.array(values)
    again = logprobs.decode_head_mass(logprobs.encode_head_mass(exact))
    assert ((again >= 0) & (again <= 1)).all()
    inside = (exact > 1e-6) & (exact < 1 - 1e-6)
    np.testing.assert_allclose(again[inside], exact[inside], rtol=1 / 400)
    np.testing.assert_allclose(1 - again[inside], 1 - exact[inside], rtol=1 / 400, atol=1e-7)


@given(st.integers(1, 70000), st.integers(0, 40), st.integers(1, 9), st.integers(0, 2**32 - 1))
@settings(max_examples=30)
def test_ids_come_back_in_the_fewest_bytes(vocabulary, rows, k, seed):
    ids = np.random.default_rng(seed).integers(0, vocabulary, (rows, k))
    ranks, table = logprobs.encode_ids(ids, vocabulary)
    np.testing.assert_array_equal(logprobs.decode_ids(ranks, table), ids)
    assert ranks.dtype == np.uint16
    assert table.dtype == (np.uint16 if vocabulary <= 65536 else np.uint32)
    counts = np.bincount(ids.ravel(), minlength=vocabulary)[table]
    assert (np.diff(counts) <= 0).all(), "frequent ids get small ranks"
