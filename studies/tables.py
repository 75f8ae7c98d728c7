"""Tables and a plot of a study's results, from its JSON files alone."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from specauf.errors import UserError
from specauf.evaluation.summary import bootstrap_paired
from studies.plan import Group, Study

Record = dict[str, Any]


def write_tables(study: Study, results: Path) -> str:
    """Write `table.md` and `gain.png` next to the results; returns the table.

    Raises:
        UserError: there is no result yet.
    """
    records = [json.loads(file.read_text()) for file in sorted(results.glob("*.json"))]
    if not records:
        raise UserError(f"{results} holds no result: run the study first")
    found = [(group, [r for r in records if r["group"] == group.name]) for group in study.merged()]
    # A loss alone is compared with other groups, if with anything.
    parts = [table(group, rows) for group, rows in found if len({r["loss"] for r in rows}) > 1]
    text = "\n\n".join(parts + ([compare(study.comparisons, records)] if study.comparisons else [])) + "\n"
    (results / "table.md").write_text(text)
    plot([(group, rows) for group, rows in found if rows], results / "gain.png")
    return text


def table(group: Group, records: Sequence[Record]) -> str:
    """One row a loss: tau by benchmark, mean over seeds, with the ratio to the base loss and its intervals."""
    names = list(records[0]["benchmarks"])
    head = ["loss", "runs"]
    head += [c for n in names for c in (f"{n} tau", f"vs {group.base}, by prompts (95 %)", "by seeds (95 %)")]
    head += ["replay tau", "token accuracy", "train s", "identical"]
    rows = []
    for loss in (loss for loss in group.losses if any(r["loss"] == loss for r in records)):
        mine = [r for r in records if r["loss"] == loss]
        cells = [f"**{loss}**" if loss == group.base else loss, str(len(mine))]
        for name in names:
            cells.append(spread([tau(r, name) for r in mine]))
            base = [r for r in records if r["loss"] == group.base]
            found = gain(mine, base, name)
            cells.append("-" if loss == group.base or found is None else "{} ({} to {})".format(*map(percent, found)))
            over = gain_over_seeds(mine, base, name)
            cells.append("-" if loss == group.base or over is None else "{} ({} to {})".format(*map(percent, over)))
        cells.append(spread([r["training"]["tau"] for r in mine]))
        cells.append(spread([r["training"]["token_accuracy"] for r in mine]))
        cells.append(f"{statistics.fmean(r['training']['seconds'] for r in mine):.0f}")
        same = sum(b["identical"] for r in mine for b in r["benchmarks"].values())
        cells.append(f"{same}/{sum(len(b['task_id']) for r in mine for b in r['benchmarks'].values())}")
        rows.append(cells)
    title = f"### {group.name}" + (f": {group.note}" if group.note else "")
    lines = [title, "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(cells) + " |" for cells in rows])


def compare(pairs: Sequence[tuple[str, str]], records: Sequence[Record]) -> str:
    """Losses of different groups against each other, on the seeds both have."""
    names = list(records[0]["benchmarks"])
    head = [
        "group/loss",
        "against",
        "runs",
        *(f"{n} tau" for n in names),
        *(f"{n} (95 %)" for n in names),
        "train s",
        "cache MB",
    ]
    rows = []
    for one, other in pairs:
        mine, base = ([r for r in records if f"{r['group']}/{r['loss']}" == name] for name in (one, other))
        both = {training(r) for r in mine} & {training(r) for r in base}
        mine, base = ([r for r in side if training(r) in both] for side in (mine, base))
        if both:
            means = [[statistics.fmean(tau(r, n) for r in side) for side in (mine, base)] for n in names]
            gains = [gain(mine, base, n) or (1.0, 1.0, 1.0) for n in names]
            seconds = [f"{statistics.fmean(r['training']['seconds'] for r in side):.0f}" for side in (mine, base)]
            cells = [one, other, str(len(both)), *("{:.3f}, {:.3f}".format(*m) for m in means)]
            cells += ["{} ({} to {})".format(*map(percent, g)) for g in gains] + [", ".join(seconds)]
            # Results from before the size was written down have none.
            sizes = [side[0].get("cache", {}).get("bytes") for side in (mine, base)]
            cells.append(", ".join("-" if size is None else f"{size / 1e6:.0f}" for size in sizes))
            rows.append(cells)
    lines = ["### Across groups", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(cells) + " |" for cells in rows])


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


def _pooled(records: Sequence[Record], benchmark: str) -> float:
    accepted, cycles = _by_prompt(records, benchmark)
    return float(accepted.sum() / cycles.sum() + 1)


def training(record: Record) -> tuple[int, int]:
    """What pairs trainings: the seed, and which repeat of it, as on a cache that was built anew."""
    return record["seed"], record.get("repeat", 0)


def _by_prompt(records: Sequence[Record], benchmark: str) -> tuple[np.ndarray, np.ndarray]:
    parts = [r["benchmarks"][benchmark] for r in records]
    accepted, cycles = (np.array([part[key] for part in parts], float).sum(0) for key in ("accepted", "cycles"))
    return accepted, cycles


def spread(values: Sequence[float | None]) -> str:
    """Mean of what was measured, and the range when there are several."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    text = f"{statistics.fmean(known):.3f}"
    return text if len(known) == 1 else f"{text} [{min(known):.3f}, {max(known):.3f}]"


def percent(ratio: float) -> str:
    """A ratio as a signed change."""
    return f"{100 * (ratio - 1):+.1f} %"


def plot(groups: Sequence[tuple[Group, Sequence[Record]]], file: Path) -> None:
    """Ratio to the base loss with its interval, one panel a group and benchmark."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    panels = [(g, rows, name) for g, rows in groups for name in rows[0]["benchmarks"] if len(g.losses) > 1]
    if not panels:
        return
    height = max(len(g.losses) for g, _, _ in panels)
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.2 * len(panels), 1.2 + 0.32 * height), squeeze=False, layout="constrained"
    )
    for axis, (group, rows, name) in zip(axes[0], panels, strict=True):
        base = [r for r in rows if r["loss"] == group.base]
        points = [
            (loss, found)
            for loss in reversed(group.losses)
            if loss != group.base and (found := gain([r for r in rows if r["loss"] == loss], base, name)) is not None
        ]
        middle = [100 * (p[1][0] - 1) for p in points]
        low, high = ([abs(100 * (p[1][i] - p[1][0])) for p in points] for i in (1, 2))
        axis.errorbar(middle, range(len(points)), xerr=[low, high], fmt="o", color="tab:blue", capsize=3)
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.set_yticks(range(len(points)), [p[0] for p in points])
        axis.set_xlabel(f"tau against {group.base}, %")
        axis.set_title(f"{group.name}, {name}", fontsize=10)
    figure.savefig(file, dpi=110)
    plt.close(figure)
