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
    """Mean over prompts of the prompt's own mean of A + 1 (z-lab's convention), those without a cycle left out."""
    return float(np.mean([np.mean(a) for a in accepted if len(a)])) + 1.0


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
    sums, cycles = per_prompt(accepted)
    return bootstrap_quotient(sums, cycles, draws=draws, seed=seed, plus=1.0)


def bootstrap_ratio(first: Accepted, second: Accepted, *, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of pooled tau(first) / tau(second), resampling the prompts they share as pairs."""
    return bootstrap_paired(*per_prompt(first), *per_prompt(second), draws=draws, seed=seed)


def bootstrap_quotient(
    parts: np.ndarray, wholes: np.ndarray, *, draws: int = 2000, seed: int = 0, plus: float = 0.0
) -> tuple[float, float]:
    """95 % percentile interval of sum(parts) / sum(wholes) + plus, resampling prompts whose whole is not 0."""
    parts, wholes = parts[wholes > 0], wholes[wholes > 0]
    picked = _resample(len(parts), draws, seed)
    return _interval(parts[picked].sum(1) / wholes[picked].sum(1) + plus)


def bootstrap_speedup(
    tokens: np.ndarray,
    seconds: np.ndarray,
    base_tokens: np.ndarray,
    base_seconds: np.ndarray,
    *,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """95 % percentile interval of the ratio of two pooled speeds over the same prompts, drawn together.

    Args:
        tokens: of each prompt's answer.
        seconds: it took.
        base_tokens: the same of the second way of decoding.
        base_seconds: the same of the second.
        draws: bootstrap samples.
        seed: of the samples.
    """
    picked = _resample(len(tokens), draws, seed)
    one = tokens[picked].sum(1) / seconds[picked].sum(1)
    two = base_tokens[picked].sum(1) / base_seconds[picked].sum(1)
    return _interval(one / two)


def bootstrap_paired(
    sums: np.ndarray,
    cycles: np.ndarray,
    base_sums: np.ndarray,
    base_cycles: np.ndarray,
    *,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """95 % percentile interval of the ratio of two pooled tau over the same prompts, drawn together.

    Args:
        sums: accepted drafts of each prompt, of the first drafter.
        cycles: its cycles.
        base_sums: the same of the second.
        base_cycles: the same of the second.
        draws: bootstrap samples.
        seed: of the samples.
    """
    decoded = (cycles > 0) & (base_cycles > 0)  # an answer of one token has no cycle
    sums, cycles, base_sums, base_cycles = (x[decoded] for x in (sums, cycles, base_sums, base_cycles))
    picked = _resample(len(sums), draws, seed)
    one = sums[picked].sum(1) / cycles[picked].sum(1) + 1.0
    two = base_sums[picked].sum(1) / base_cycles[picked].sum(1) + 1.0
    return _interval(one / two)


def per_prompt(accepted: Accepted) -> tuple[np.ndarray, np.ndarray]:
    """Accepted drafts and cycles of each prompt."""
    return np.array([sum(a) for a in accepted], float), np.array([len(a) for a in accepted], float)


def _resample(prompts: int, draws: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, prompts, (draws, prompts))


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
