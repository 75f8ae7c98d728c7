import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specauf.evaluation import summary
from specauf.evaluation.summary import (
    bootstrap_paired,
    bootstrap_ratio,
    bootstrap_tau,
    conditional_acceptance,
    survival,
    tau_per_prompt,
    tau_pooled,
)

ACCEPTED = [[0, 2, 1], [3]]
prompts = st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=6), min_size=1, max_size=6)


def test_both_tau_conventions_by_hand():
    assert tau_pooled(ACCEPTED) == pytest.approx(1 + 6 / 4)
    assert tau_per_prompt(ACCEPTED) == pytest.approx(1 + (1 + 3) / 2)


def test_survival_and_conditional_by_hand():
    assert survival(ACCEPTED, 4) == [0.75, 0.5, 0.25, 0.0]
    assert conditional_acceptance(ACCEPTED, 5) == [0.75, pytest.approx(2 / 3), 0.5, 0.0, None]


@given(prompts)
def test_tau_is_one_plus_the_sum_of_survival(accepted):
    assert tau_pooled(accepted) == pytest.approx(1 + sum(survival(accepted, 7)))


@given(prompts)
def test_interval_contains_the_estimate_range_of_prompts(accepted):
    low, high = bootstrap_tau(accepted, draws=50)
    means = [np.mean(a) + 1 for a in accepted]
    assert min(means) - 1e-9 <= low <= high <= max(means) + 1e-9


def test_ratio_of_a_drafter_to_itself_is_exactly_one():
    assert bootstrap_ratio(ACCEPTED, ACCEPTED) == (1.0, 1.0)


def test_ratio_is_paired_over_prompts():
    rng = np.random.default_rng(0)
    hard = [rng.integers(0, 8, 20).tolist() for _ in range(30)]
    easier = [[a + 1 for a in prompt] for prompt in hard]
    low, high = bootstrap_ratio(easier, hard)
    unpaired = np.divide(*bootstrap_tau(easier)[::-1])
    assert 1.0 < low < high
    assert high / low < unpaired


def test_the_interval_of_a_speed_up_holds_it_when_answers_differ_in_length():
    """Many short answers that gain nothing, a few long ones that gain much."""
    tokens = np.array([100.0] * 8 + [4.0] * 24)
    base_tokens = tokens + 1
    base_seconds, seconds = base_tokens * 0.1, np.where(tokens > 50, tokens * 0.06, tokens * 0.1)
    point = (tokens.sum() / seconds.sum()) / (base_tokens.sum() / base_seconds.sum())
    low, high = bootstrap_paired(tokens, seconds, base_tokens, base_seconds)
    assert low < point < high
    assert bootstrap_paired(tokens, seconds, tokens, seconds) == (1.0, 1.0)


def test_prompts_without_a_cycle_change_no_interval():
    assert bootstrap_tau([*ACCEPTED, [], []], draws=50) == bootstrap_tau(ACCEPTED, draws=50)
    assert bootstrap_ratio([*ACCEPTED, []], [*ACCEPTED, []]) == (1.0, 1.0)


@pytest.mark.parametrize("at_once", [1, 7, 10**9])
def test_draws_are_the_same_however_many_are_made_at_a_time(monkeypatch, at_once):
    rng = np.random.default_rng(0)
    columns = [rng.integers(1, 9, 50).astype(float) for _ in range(4)]
    picked = np.random.default_rng(3).integers(0, 50, (200, 50))
    one, two, three, four = (column[picked].sum(1) for column in columns)
    monkeypatch.setattr(summary, "PICKED", at_once * 50)
    low, high = np.quantile((one / two + 1) / (three / four + 1), [0.025, 0.975])
    assert bootstrap_paired(*columns, draws=200, seed=3, plus=1.0) == (low, high)
