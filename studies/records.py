"""What the JSON record of a training says: emitted length, and gains over another's with their intervals."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from specauf.evaluation.summary import bootstrap_paired

Record = dict[str, Any]


def tau(record: Record, benchmark: str) -> float:
    """Pooled emitted length A + 1."""
    return _pooled([record], benchmark)


def paired(records: Sequence[Record], base: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """Those of each side that have a partner: the same seed, and the same repeat of it, as on a cache built anew."""
    names = [{_training(r) for r in side} for side in (records, base)]
    mine, theirs = ([r for r in side if _training(r) in names[0] & names[1]] for side in (records, base))
    return mine, theirs


def gain(records: Sequence[Record], base: Sequence[Record], benchmark: str) -> tuple[float, float, float] | None:
    """Ratio of pooled tau to the base's over paired trainings, with its 95 % interval: prompts drawn in pairs.

    A prompt's cycles of all seeds are drawn together, so seeds do not pass for independent prompts.
    """
    mine, theirs = paired(records, base)
    if not mine:
        return None
    ratio = _pooled(mine, benchmark) / _pooled(theirs, benchmark)
    return (ratio, *bootstrap_paired(*_by_prompt(mine, benchmark), *_by_prompt(theirs, benchmark), plus=1.0))


def gain_over_seeds(
    records: Sequence[Record], base: Sequence[Record], benchmark: str
) -> tuple[float, float, float] | None:
    """Geometric mean of the seeds' ratios of tau to the base's, with the 95 % t interval over three seeds or more.

    It covers what another seed would change: initial weights, order, anchors. Repeats of a seed are pooled.
    """
    sides = paired(records, base)
    seeds = {r["seed"] for r in sides[0]}
    if len(seeds) < 3:
        return None
    taus = np.array([[_pooled([r for r in side if r["seed"] == s], benchmark) for s in seeds] for side in sides])
    logs = np.log(taus[0] / taus[1])
    low, high = stats.ttest_1samp(logs, 0.0).confidence_interval(0.95)
    return float(np.exp(logs.mean())), float(np.exp(low)), float(np.exp(high))


def _training(record: Record) -> tuple[int, int]:
    return record["seed"], record.get("repeat", 0)


def _pooled(records: Sequence[Record], benchmark: str) -> float:
    accepted, cycles = _by_prompt(records, benchmark)
    return float(accepted.sum() / cycles.sum() + 1)


def _by_prompt(records: Sequence[Record], benchmark: str) -> tuple[np.ndarray, np.ndarray]:
    parts = [r["benchmarks"][benchmark] for r in records]
    accepted, cycles = (np.array([part[key] for part in parts], float).sum(0) for key in ("accepted", "cycles"))
    return accepted, cycles
