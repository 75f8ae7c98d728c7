"""The plot of `benchmarks.scale`: one panel for each thing that varies, both axes logarithmic."""

from collections.abc import Mapping, Sequence
from typing import Any

TITLES = {
    "corpus": "tokens of the corpus",
    "k": "K",
    "ranks": "ranks (one of them)",
    "block_size": "block size (64 anchors)",
    "anchors": "anchors (blocks of 16)",
}
LABELS = {
    "write_seconds": "writing, s",
    "read_seconds": "reading, s",
    "bytes": "size, MB",
    "reader_mib": "reader's memory, MiB",
    "step_seconds": "step, s",
    "step_mib": "step's memory, MiB",
}


def series(rows: Sequence[tuple[int, Mapping[str, Any]]]) -> dict[str, tuple[list[int], list[float]]]:
    """Label -> sizes and costs of each figure that is drawn; bytes in MB."""
    out = {}
    for key, label in LABELS.items():
        if key in rows[0][1]:
            scale = 1e-6 if key == "bytes" else 1.0
            out[label] = ([size for size, _ in rows], [row[key] * scale for _, row in rows])
    return out


def draw(found: Mapping[str, Sequence[tuple[int, Mapping[str, Any]]]], path: str) -> None:
    """Write the PNG; dotted lines of slope 1 through the last points show what linear is."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(found), figsize=(3.6 * len(found), 3.6), squeeze=False)
    for axis, (name, rows) in zip(axes[0], found.items(), strict=True):
        for label, (sizes, costs) in series(rows).items():
            (line,) = axis.plot(sizes, costs, "o-", label=label, markersize=4)
            if name != "ranks":
                linear = [costs[-1] * size / sizes[-1] for size in sizes]
                axis.plot(sizes, linear, ":", color=line.get_color(), linewidth=0.8)
        axis.set(xscale="log", yscale="log", xlabel=TITLES[name])
        if name != "corpus":
            axis.set_xticks([size for size, _ in rows], [str(size) for size, _ in rows])
            axis.minorticks_off()
        axis.legend(fontsize=7)
        axis.grid(visible=True, which="major", alpha=0.3)
    figure.suptitle("Cost against size; dotted: linear, through the last point", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
