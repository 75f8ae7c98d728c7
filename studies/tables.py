"""Tables and plots of a study's results, from its JSON files alone."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from specauf.errors import UserError
from studies.plan import Curve, Group, Study
from studies.plots import plot_curve, plot_gains
from studies.records import Record, gain, gain_over_seeds, p_over_seeds, paired, tau


def write_tables(study: Study, results: Path) -> str:
    """Write `table.md`, `gain.png` and the study's curves next to the results; returns the table.

    Raises:
        UserError: there is no result yet, or they are of different benchmarks or prompts.
    """
    files = sorted(results.glob("*.json"))
    records = [json.loads(file.read_text()) for file in files]
    if not records:
        raise UserError(f"{results} holds no result: run the study first")
    for file, record in zip(files, records, strict=True):
        if record["benchmarks"].keys() != records[0]["benchmarks"].keys():
            one, two = (", ".join(r["benchmarks"]) for r in (records[0], record))
            raise UserError(
                f"benchmarks: {one} in {files[0]}, {two} in {file}; remove the results that lack some and run the "
                "study again with the same --also"
            )
        for name, found in record["benchmarks"].items():
            if found["task_id"] != records[0]["benchmarks"][name]["task_id"]:
                raise UserError(
                    f"{name}: {files[0]} and {file} decoded different prompts, the same expected: remove the result of "
                    "one and run the study again"
                )
    found = [(group, [r for r in records if r["group"] == group.name]) for group in study.merged()]
    # A loss alone is compared with other groups, if with anything.
    parts = [table(group, rows) for group, rows in found if len({r["loss"] for r in rows}) > 1]
    trained = [(group, rows) for group, rows in found if rows]
    parts += [gains(trained)] if len(trained) > 1 else []
    parts += [compare(study.comparisons, records)] if study.comparisons else []
    parts += [curve_table(curve, records) for curve in study.curves]
    parts += [line] if (line := several_tests(study, records)) else []
    text = "\n\n".join(parts) + "\n"
    (results / "table.md").write_text(text)
    plot_gains(trained, results / "gain.png")
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
            found = [None, None] if loss == group.base else [f(mine, base, name) for f in (gain, gain_over_seeds)]
            cells += map(interval, found)
        cells.append(spread([r["training"]["tau"] for r in mine]))
        cells.append("-" if loss == group.base else replay_gain(mine, base))
        cells.append(spread([r["training"]["token_accuracy"] for r in mine]))
        cells.append(f"{statistics.fmean(r['training']['seconds'] for r in mine):.0f}")
        same = sum(b["identical"] for r in mine for b in r["benchmarks"].values())
        cells.append(f"{same}/{sum(len(b['task_id']) for r in mine for b in r['benchmarks'].values())}")
        rows.append(cells)
    title = f"### {group.name}" + (f": {group.note}" if group.note else "")
    lines = [title, "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(cells) + " |" for cells in rows])


def gains(groups: Sequence[tuple[Group, Sequence[Record]]]) -> str:
    """One row a group and loss, by the emitted length that the base loss has already."""
    names = list(groups[0][1][0]["benchmarks"])
    head = ["group: loss / base", "steps", "runs", f"base's {names[0]} tau", *names, "replay"]
    rows = []
    for group, records in groups:
        for loss in (loss for loss in group.losses if loss != group.base):
            mine, base = paired(*([r for r in records if r["loss"] == wanted] for wanted in (loss, group.base)))
            if mine:
                level, steps = statistics.fmean(tau(r, names[0]) for r in base), base[0]["training"]["steps"]
                cells = [f"{group.name}: {loss} / {group.base}", f"{steps:,}", str(len(mine)), f"{level:.3f}"]
                cells += [interval(gain(mine, base, name)) for name in names] + [replay_gain(mine, base)]
                rows.append((level, cells))
    lines = [
        "### Gains by prompts (95 %), the worst base first",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
    ]
    return "\n".join(lines + ["| " + " | ".join(cells) + " |" for _, cells in sorted(rows)])


def compare(pairs: Sequence[tuple[str, str]], records: Sequence[Record]) -> str:
    """Losses of different groups against each other, on the seeds both have."""
    names = list(records[0]["benchmarks"])
    head = ["group/loss", "against", "runs"]
    head += [c for n in names for c in (f"{n} tau", "by prompts (95 %)", "by seeds (95 %)")]
    head += ["replay tau", "gain", "train s", "cache MB"]
    rows = []
    for one, other in pairs:
        mine, base = ([r for r in records if f"{r['group']}/{r['loss']}" == name] for name in (one, other))
        mine, base = paired(mine, base)
        if mine:
            cells = [one, other, str(len(mine))]
            for name in names:
                cells.append(both([[tau(r, name) for r in side] for side in (mine, base)]))
                cells += [interval(f(mine, base, name)) for f in (gain, gain_over_seeds)]
            cells.append(both([[r["training"]["tau"] for r in side] for side in (mine, base)]))
            cells.append(replay_gain(mine, base))
            cells.append(both([[r["training"]["seconds"] for r in side] for side in (mine, base)], digits=0))
            # Results from before the size was written down have none.
            sizes = [[r["cache"]["bytes"] / 1e6 for r in side if "cache" in r] for side in (mine, base)]
            cells.append(both(sizes, digits=0))
            rows.append(cells)
    lines = ["### Across groups", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(cells) + " |" for cells in rows])


def several_tests(study: Study, records: Sequence[Record]) -> str:
    """How many intervals by seeds the tables hold, and which leave out 0 when that many are looked at (Holm).

    None of several intervals at 95 % is a finding of its own: of twenty without any effect, one leaves out 0 by chance.
    """
    pairs = [(f"{g.name}/{loss}", f"{g.name}/{g.base}") for g in study.merged() for loss in g.losses if loss != g.base]
    tests = []
    for one, other in [*pairs, *study.comparisons]:
        mine, base = ([r for r in records if f"{r['group']}/{r['loss']}" == name] for name in (one, other))
        found = {name: p_over_seeds(mine, base, name) for name in records[0]["benchmarks"]}
        tests += [(p, f"{one} against {other} on {name}") for name, p in found.items() if p is not None]
    if not tests:
        return ""
    tests.sort()
    remain = []
    for i, (p, name) in enumerate(tests):
        if p > 0.05 / (len(tests) - i):
            break
        remain.append(f"{name} (p = {p:.2g})")
    alone = sum(p < 0.05 for p, _ in tests)
    return "### Several tests\n\n" + (
        f"Of {len(tests)} intervals by seeds {alone} leave out 0, where {len(tests) / 20:.0f} would "
        f"by chance. Corrected for {len(tests)} (Holm) there remain: {', '.join(remain) or 'none'}."
    )


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


def interval(found: tuple[float, float, float] | None) -> str:
    """A ratio and its interval as signed changes."""
    return "-" if found is None else "{} ({} to {})".format(*map(percent, found))


def both(sides: Sequence[Sequence[float]], digits: int = 3) -> str:
    """The means of two sides."""
    return ", ".join(f"{statistics.fmean(side):.{digits}f}" if side else "-" for side in sides)


def replay_gain(records: Sequence[Record], base: Sequence[Record]) -> str:
    """Ratio of emitted length on held-out answers over paired trainings."""
    one, other = ([r["training"]["tau"] for r in side] for side in paired(records, base))
    return percent(sum(one) / sum(other)) if one else "-"
