"""From per-cycle acceptances to figures: pure functions, no model."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

Accepted = Sequence[Sequence[int]]
"""Accepted drafts A of every cycle, one list a prompt."""


def tau_pooled(accepted: Accepted) -> float:
    """Mean of A + 1 over all cycles of all prompts."""
    return float(np.mean(np.concatenate([np.asarray(a) for a in accepted]))) + 1.0


def tau_per_prompt(accepted: Accepted) -> float:
    """Mean over prompts of the prompt's own mean of A + 1 (z-lab's convention)."""
    return float(np.mean([np.mean(a) for a in accepted])) + 1.0


def survival(accepted: Accepted, slots: int) -> list[float]:
    """Share of cycles with A >= k, for k = 1..slots."""
    pooled = np.concatenate([np.asarray(a) for a in accepted])
    return [float(np.mean(pooled >= k)) for k in range(1, slots + 1)]


def conditional_acceptance(accepted: Accepted, slots: int) -> list[float | None]:
    """Share of the cycles with A >= k-1 that reach A >= k; None where no cycle got that far."""
    alive = [1.0, *survival(accepted, slots)]
    return [b / a if a > 0 else None for a, b in pairwise(alive)]


def bootstrap_tau(accepted: Accepted, *, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the pooled tau, resampling prompts."""
    sums, cycles = _per_prompt(accepted)
    picked = _resample(len(sums), draws, seed)
    taus = sums[picked].sum(1) / cycles[picked].sum(1) + 1.0
    return _interval(taus)


def bootstrap_ratio(first: Accepted, second: Accepted, *, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of pooled tau(first) / tau(second), resampling the prompts they share as pairs."""
    (s1, c1), (s2, c2) = _per_prompt(first), _per_prompt(second)
    picked = _resample(len(s1), draws, seed)
    one = s1[picked].sum(1) / c1[picked].sum(1) + 1.0
    two = s2[picked].sum(1) / c2[picked].sum(1) + 1.0
    return _interval(one / two)


def _per_prompt(accepted: Accepted) -> tuple[np.ndarray, np.ndarray]:
    return np.array([sum(a) for a in accepted], float), np.array([len(a) for a in accepted], float)


def _resample(prompts: int, draws: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, prompts, (draws, prompts))


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
