"""Tables and plots of a study's results, from its JSON files alone."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from specauf.errors import UserError
from studies.plan import Curve, Group, Study
from studies.plots import plot_curve, plot_gains
from studies.records import Record, gain, gain_over_seeds, paired, tau


def write_tables(study: Study, results: Path) -> str:
    """Write `table.md`, `gain.png` and the study's curves next to the results; returns the table.

    Raises:
        UserError: there is no result yet.
    """
    records = [json.loads(file.read_text()) for file in sorted(results.glob("*.json"))]
    if not records:
        raise UserError(f"{results} holds no result: run the study first")
    found = [(group, [r for r in records if r["group"] == group.name]) for group in study.merged()]
    # A loss alone is compared with other groups, if with anything.
    parts = [table(group, rows) for group, rows in found if len({r["loss"] for r in rows}) > 1]
    parts += [compare(study.comparisons, records)] if study.comparisons else []
    parts += [curve_table(curve, records) for curve in study.curves]
    text = "\n\n".join(parts) + "\n"
    (results / "table.md").write_text(text)
    plot_gains([(group, rows) for group, rows in found if rows], results / "gain.png")
    for curve in study.curves:
        plot_curve(curve, records, results / curve.file)
    return text


def table(group: Group, records: Sequence[Record]) -> str:
    """One row a loss: tau by benchmark, mean over seeds, with the ratio to the base loss and its intervals."""
    names = list(records[0]["benchmarks"])
    head = ["loss", "runs"]
    head += [c for n in names for c in (f"{n} tau", f"vs {group.base}, by prompts (95 %)", "by seeds (95 %)")]
    head += ["replay tau", f"vs {group.base}", "token accuracy", "train s", "identical"]
    rows = []
    for loss in (loss for loss in group.losses if any(r["loss"] == loss for r in records)):
        mine = [r for r in records if r["loss"] == loss]
        cells = [f"**{loss}**" if loss == group.base else loss, str(len(mine))]
        base = [r for r in records if r["loss"] == group.base]
        for name in names:
            cells.append(spread([tau(r, name) for r in mine]))
            found = gain(mine, base, name)
            cells.append("-" if loss == group.base or found is None else "{} ({} to {})".format(*map(percent, found)))
            over = gain_over_seeds(mine, base, name)
            cells.append("-" if loss == group.base or over is None else "{} ({} to {})".format(*map(percent, over)))
        cells.append(spread([r["training"]["tau"] for r in mine]))
        one, other = ([r["training"]["tau"] for r in side] for side in paired(mine, base))
        cells.append("-" if loss == group.base or not one else percent(sum(one) / sum(other)))
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
        mine, base = paired(mine, base)
        if mine:
            means = [[statistics.fmean(tau(r, n) for r in side) for side in (mine, base)] for n in names]
            gains = [gain(mine, base, n) or (1.0, 1.0, 1.0) for n in names]
            seconds = [f"{statistics.fmean(r['training']['seconds'] for r in side):.0f}" for side in (mine, base)]
            cells = [one, other, str(len(mine)), *("{:.3f}, {:.3f}".format(*m) for m in means)]
            cells += ["{} ({} to {})".format(*map(percent, g)) for g in gains] + [", ".join(seconds)]
            # Results from before the size was written down have none.
            sizes = [side[0].get("cache", {}).get("bytes") for side in (mine, base)]
            cells.append(", ".join("-" if size is None else f"{size / 1e6:.0f}" for size in sizes))
            rows.append(cells)
    lines = ["### Across groups", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(cells) + " |" for cells in rows])


def curve_table(curve: Curve, records: Sequence[Record]) -> str:
    """One row a training's kind, in the order of what it had: every training of it, paired or not."""
    names = list(records[0]["benchmarks"])
    head = ["group/loss", curve.label, "runs", *(f"{n} tau" for n in names), "replay tau"]
    lines = [f"### {curve.file}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, amount, mine in curve.points(records):
        cells = [name, f"{amount:,.0f}", str(len(mine)), *(spread([tau(r, n) for r in mine]) for n in names)]
        lines.append("| " + " | ".join([*cells, spread([r["training"]["tau"] for r in mine])]) + " |")
    return "\n".join(lines)


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
