"""Pictures of a study's results."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from studies.plan import Curve, Group
from studies.records import Record, gain, tau

REPLAY = "replay of held-out answers"


def plot_gains(groups: Sequence[tuple[Group, Sequence[Record]]], file: Path) -> None:
    """Ratio to each group's base loss with its interval over prompts: a row a group and loss, a panel a benchmark."""
    rows = [
        (g, loss, rs) for g, rs in groups for loss in g.losses if loss != g.base and any(r["loss"] == loss for r in rs)
    ]
    if not rows:
        return
    plt = _pyplot()
    names = list(rows[0][2][0]["benchmarks"])
    figure, axes = plt.subplots(
        1,
        len(names),
        figsize=(4.2 * len(names) + 1.6, 1.0 + 0.26 * len(rows)),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    for axis, name in zip(axes[0], names, strict=True):
        for place, (group, loss, records) in enumerate(reversed(rows)):
            mine, base = ([r for r in records if r["loss"] == wanted] for wanted in (loss, group.base))
            if (found := gain(mine, base, name)) is not None:
                middle, low, high = (100 * (ratio - 1) for ratio in found)
                axis.errorbar(
                    middle, place, xerr=[[middle - low], [high - middle]], fmt="o", color="tab:blue", capsize=3
                )
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.set_xlabel("emitted length against the base, %")
        axis.set_title(name, fontsize=10)
    axes[0][0].set_yticks(range(len(rows)), [f"{g.name}: {loss} / {g.base}" for g, loss, _ in reversed(rows)])
    figure.savefig(file, dpi=110)
    plt.close(figure)


def plot_curve(curve: Curve, records: Sequence[Record], file: Path) -> None:
    """Tau against what trainings had of something: a dot a training, a line a loss through the means."""
    points = curve.points(records)
    if not points:
        return
    plt = _pyplot()
    panels = [*records[0]["benchmarks"], REPLAY]
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.2), squeeze=False, layout="constrained")
    for axis, panel in zip(axes[0], panels, strict=True):
        for loss in dict.fromkeys(name.split("/")[1] for name, _, _ in points):
            mine = [
                (x, [r["training"]["tau"] if panel == REPLAY else tau(r, panel) for r in rows])
                for name, x, rows in points
                if name.split("/")[1] == loss
            ]
            (line,) = axis.plot([x for x, _ in mine], [statistics.fmean(ys) for _, ys in mine], label=loss)
            axis.plot([x for x, ys in mine for _ in ys], [y for _, ys in mine for y in ys], ".", color=line.get_color())
        axis.set_xscale("log")
        places = sorted({x for _, x, _ in points})
        axis.set_xticks(places, [f"{x:,.0f}" for x in places], rotation=60)
        axis.minorticks_off()
        axis.set_xlabel(curve.label)
        axis.set_ylabel("emitted length")
        axis.set_title(panel, fontsize=10)
    axes[0][0].legend()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    return plt
