"""From per-cycle acceptances to figures: pure functions, no model."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

PICKED = 100_000  # prompts drawn at a time
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
    return bootstrap_paired(*per_prompt(first), *per_prompt(second), draws=draws, seed=seed, plus=1.0)


def bootstrap_quotient(
    parts: np.ndarray, wholes: np.ndarray, *, draws: int = 2000, seed: int = 0, plus: float = 0.0
) -> tuple[float, float]:
    """95 % percentile interval of sum(parts) / sum(wholes) + plus, resampling prompts whose whole is not 0."""
    parts, wholes = parts[wholes > 0], wholes[wholes > 0]
    part, whole = _resampled_sums((parts, wholes), draws, seed)
    return _interval(part / whole + plus)


def bootstrap_paired(
    parts: np.ndarray,
    wholes: np.ndarray,
    base_parts: np.ndarray,
    base_wholes: np.ndarray,
    *,
    draws: int = 2000,
    seed: int = 0,
    plus: float = 0.0,
) -> tuple[float, float]:
    """95 % percentile interval of the ratio of two quotients over the same prompts, drawn together.

    Each is sum(parts) / sum(wholes) + plus; prompts of which either whole is 0 are left out.

    Args:
        parts: of each prompt, of the first way of decoding: accepted drafts, or tokens.
        wholes: its cycles, or seconds.
        base_parts: the same of the second.
        base_wholes: the same of the second.
        draws: bootstrap samples.
        seed: of the samples.
        plus: 1 for emitted lengths.
    """
    there = (wholes > 0) & (base_wholes > 0)  # an answer of one token has no cycle
    columns = [x[there] for x in (parts, wholes, base_parts, base_wholes)]
    part, whole, base_part, base_whole = _resampled_sums(columns, draws, seed)
    return _interval((part / whole + plus) / (base_part / base_whole + plus))


def per_prompt(accepted: Accepted) -> tuple[np.ndarray, np.ndarray]:
    """Accepted drafts and cycles of each prompt."""
    return np.array([sum(a) for a in accepted], float), np.array([len(a) for a in accepted], float)


def _resampled_sums(columns: Sequence[np.ndarray], draws: int, seed: int) -> np.ndarray:
    """Sums of columns over the prompts of each draw, [columns, draws]; some draws at a time, for sets of any size."""
    rng, prompts = np.random.default_rng(seed), len(columns[0])
    at_once = max(1, PICKED // prompts)
    parts = []
    for start in range(0, draws, at_once):
        picked = rng.integers(0, prompts, (min(at_once, draws - start), prompts))
        parts.append([column[picked].sum(1) for column in columns])
    return np.concatenate(parts, 1)


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
