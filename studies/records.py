"""What the JSON record of a training says: emitted length, and gains over another's with their intervals."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from specauf.evaluation.summary import bootstrap_paired

Record = dict[str, Any]


def tau(record: Record, benchmark: str) -> float:
    """Pooled emitted length A + 1."""
    part = record["benchmarks"][benchmark]
    return 1 + sum(part["accepted"]) / sum(part["cycles"])


def gain(records: Sequence[Record], base: Sequence[Record], benchmark: str) -> tuple[float, float, float] | None:
    """Ratio of pooled tau to the base's over the seeds both have, with its 95 % interval: prompts drawn in pairs.

    A prompt's cycles of all seeds are drawn together, so seeds do not pass for independent prompts.
    """
    both = {training(r) for r in records} & {training(r) for r in base}
    if not both:
        return None
    sums = [_by_prompt([r for r in side if training(r) in both], benchmark) for side in (records, base)]
    (a, c), (a0, c0) = sums
    ratio = (a.sum() / c.sum() + 1) / (a0.sum() / c0.sum() + 1)
    return (float(ratio), *bootstrap_paired(a, c, a0, c0))


def gain_over_seeds(
    records: Sequence[Record], base: Sequence[Record], benchmark: str
) -> tuple[float, float, float] | None:
    """Geometric mean of the seeds' ratios of tau to the base's, with the 95 % t interval over three seeds or more.

    It covers what another seed would change: initial weights, order, anchors. Repeats of a seed are pooled.
    """
    both = {training(r) for r in records} & {training(r) for r in base}
    seeds = sorted({seed for seed, _ in both})
    if len(seeds) < 3:
        return None
    logs = []
    for seed in seeds:
        mine, theirs = ([r for r in side if training(r) in both and r["seed"] == seed] for side in (records, base))
        logs.append(np.log(_pooled(mine, benchmark) / _pooled(theirs, benchmark)))
    low, high = stats.ttest_1samp(logs, 0.0).confidence_interval(0.95)
    return float(np.exp(np.mean(logs))), float(np.exp(low)), float(np.exp(high))


def training(record: Record) -> tuple[int, int]:
    """What pairs trainings: the seed, and which repeat of it, as on a cache that was built anew."""
    return record["seed"], record.get("repeat", 0)


def _pooled(records: Sequence[Record], benchmark: str) -> float:
    accepted, cycles = _by_prompt(records, benchmark)
    return float(accepted.sum() / cycles.sum() + 1)


def _by_prompt(records: Sequence[Record], benchmark: str) -> tuple[np.ndarray, np.ndarray]:
    parts = [r["benchmarks"][benchmark] for r in records]
    accepted, cycles = (np.array([part[key] for part in parts], float).sum(0) for key in ("accepted", "cycles"))
    return accepted, cycles
