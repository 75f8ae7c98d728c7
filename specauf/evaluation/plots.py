"""Plots of an evaluation record; each names the JSON fields it draws."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from specauf.evaluation.report import prompt_count

Record = Mapping[str, Any]
GREYS = ("0.6", "0.75")
LONGEST = 30  # letters of a name; an axis is some 45 wide


class Figure(NamedTuple):
    """One plot of the page: an SVG element, its title, and the fields of report.json it shows."""

    title: str
    svg: str
    fields: str


def overview(record: Record, path: Path) -> None:
    """Write a PNG: emitted length with intervals, acceptance per slot, tokens per second; of the first part."""
    figure, axes = _subplots(3, 13)
    runs = _legible(record["runs"])
    _tau(axes[0], runs)
    _survival(axes[1], runs, "accepted_per_slot")
    _speed(axes[2], runs)
    bench = record["benchmark"]
    title = f"{_short(record['target'])}, {_short(bench['name'])}, {prompt_count(bench)}, {bench['setting']}"
    figure.suptitle(_plain(title))
    figure.savefig(path, dpi=130)


def figures(record: Record) -> list[Figure]:
    """The page's plots: for each part tau, acceptance, conditional acceptance, speed and time; then training."""
    out = []
    for i, part in enumerate(record["parts"]):
        runs, bench = _legible(part["runs"]), part["benchmark"]
        where, field = f"{bench['name']}, {bench['setting']}", f"parts[{i}].runs.*"
        figure, axes = _subplots(3, 13)
        _tau(axes[0], runs)
        _survival(axes[1], runs, "accepted_per_slot")
        _survival(axes[2], runs, "conditional_acceptance")
        names = "tau_pooled, tau_pooled_95, accepted_per_slot, conditional_acceptance"
        out.append(Figure(f"Acceptance: {where}", _svg(figure), f"{field}: {names}"))
        figure, axes = _subplots(2, 13)
        _speed(axes[0], runs)
        _time(axes[1], runs)
        names = "tokens_per_second, baseline_tokens_per_second, generate_tokens_per_second, milliseconds_per_token"
        out.append(Figure(f"Speed: {where}", _svg(figure), f"{field}: {names}"))
    curves = sorted({n for run in record.get("training", {}).values() for n, c in run.items() if len(c["step"]) > 1})
    if curves:
        figure, axes = _subplots(len(curves), 4.4 * len(curves))
        for axis, name in zip(axes, curves, strict=True):
            for i, (run, found) in enumerate(_legible(record["training"]).items()):
                if name in found:
                    axis.plot(found[name]["step"], found[name]["value"], color=f"C{i}", label=run, marker=".")
            axis.set_title(name)
            axis.set_xlabel("step")
            axis.legend()
        out.append(Figure("Training", _svg(figure), "training.*: " + ", ".join(curves)))
    return out


def _legible(by_name: Record) -> Record:
    """Names that matplotlib shows as they are, each once; it would hide _names."""
    found: dict[str, Any] = {}
    for name, value in by_name.items():
        label = (" " if name.startswith("_") else "") + _plain(_short(name))
        found[label if label not in found else f"{label} ({len(found) + 1})"] = value
    return found


def _short(text: str) -> str:
    """Text without its middle where it is too long for an axis."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]}\u2026{text[-LONGEST // 2 :]}"


def _plain(text: str) -> str:
    """Text that matplotlib shows as it is: it would set what stands between $ as a formula."""
    return text.replace("$", r"\$")


def _subplots(columns: int, width: int | float) -> tuple[Any, list[Any]]:
    # Figures of their own, without pyplot: nothing to close, and no display is looked for.
    from matplotlib.figure import Figure as Canvas

    figure = Canvas(figsize=(width, 3.8), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)
    return figure, list(axes[0])


def _svg(figure: Any) -> str:
    from matplotlib import rc_context

    out = io.StringIO()
    with rc_context({"svg.hashsalt": "specauf"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def _name(axis: Any, names: list[str]) -> None:
    """Name what stands at 0, 1, ...; aslant where the names would run into one another."""
    aslant = {"rotation": 25, "ha": "right", "rotation_mode": "anchor"} if sum(map(len, names)) > LONGEST else {}
    axis.set_xticks(range(len(names)), names, **aslant)


def _tau(axis: Any, runs: Record) -> None:
    for i, run in enumerate(runs.values()):
        tau, (low, high) = run["tau_pooled"], run["tau_pooled_95"]
        axis.errorbar(i, tau, yerr=[[max(0, tau - low)], [max(0, high - tau)]], fmt="o", capsize=5, color=f"C{i}")
        axis.annotate(f"{tau:.3f}", (i, tau), xytext=(8, 0), textcoords="offset points", va="center")
        axis.set_xlim(-0.6, i + 0.6)
    _name(axis, list(runs))
    axis.set_title("emitted length (A + 1), pooled, 95 %")
    axis.set_ylabel("tokens a cycle")


def _survival(axis: Any, runs: Record, field: str) -> None:
    for i, (name, run) in enumerate(runs.items()):
        share = [float("nan") if value is None else value for value in run[field]]
        axis.plot(range(1, len(share) + 1), share, marker="o", color=f"C{i}", label=name)
    whole = field == "accepted_per_slot"
    axis.set_title("share of cycles that accept slot k" if whole else "acceptance of slot k where it is reached")
    axis.set_xlabel("slot k")
    axis.xaxis.get_major_locator().set_params(integer=True)
    shares = [share for run in runs.values() for share in run[field] if share]
    if whole and shares and max(shares) > 10 * min(shares):
        axis.set_yscale("log")
    elif whole:
        axis.set_ylim(bottom=0)
    axis.legend()


def _speed(axis: Any, runs: Record) -> None:
    first = next(iter(runs.values()))
    speeds = {"generate": first["generate_tokens_per_second"], "plain": first["baseline_tokens_per_second"]}
    speeds |= {name: run["tokens_per_second"] for name, run in runs.items()}
    bars = axis.bar(range(len(speeds)), list(speeds.values()), color=[*GREYS, *(f"C{i}" for i in range(len(runs)))])
    _name(axis, list(speeds))
    axis.bar_label(bars, fmt="%.1f")
    axis.set_title("tokens per second")


def _time(axis: Any, runs: Record) -> None:
    below = [0.0] * len(runs)
    for name, label in (("prefill", "prompt"), ("draft", "drafting"), ("verify", "verifying"), ("other", "rest")):
        heights = [run["milliseconds_per_token"][name] for run in runs.values()]
        axis.bar(range(len(runs)), heights, bottom=below, label=label)
        below = [a + b for a, b in zip(below, heights, strict=True)]
    _name(axis, list(runs))
    axis.set_title("milliseconds a token")
    axis.legend()
