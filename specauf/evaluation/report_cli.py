"""`specauf report`; needs no torch."""

from itertools import takewhile
from pathlib import Path

from specauf.command import run_function
from specauf.errors import UserError
from specauf.evaluation.compare import join
from specauf.evaluation.page import html
from specauf.evaluation.plots import figures, overview
from specauf.evaluation.record import EVALUATION, read_record, save_record
from specauf.evaluation.report import markdown


def report_command(runs: list[Path], out: Path | None = None) -> None:
    """Write report.md, report.html, report.json and report.png from one evaluation or several.

    Args:
        runs: evaluation.json files, or the directories that hold them.
        out: where to write; beside the first evaluation by default.
    """
    places = {place: place / EVALUATION if place.is_dir() else place for place in runs}
    records = {name: read_record(source) for name, source in zip(_names(list(places)), places.values(), strict=True)}
    if not records:
        raise UserError("runs: none given, at least one expected: name directories that hold an evaluation.json")
    record = join(records)
    directory = out or (runs[0] if runs[0].is_dir() else runs[0].parent)
    directory.mkdir(parents=True, exist_ok=True)
    save_record(record, directory / "report.json")
    overview(record, directory / "report.png")
    page = markdown(record, "report.png")
    (directory / "report.md").write_text(page)
    (directory / "report.html").write_text(html(record, figures(record)))
    print(page)
    print(f"written {directory}/report.md, report.html, report.json and report.png")


def _names(places: list[Path]) -> list[str]:
    """What is left of each path without the directories that they share; it goes before names that several have."""
    parts = [place.parts for place in places]
    shared = len(list(takewhile(lambda level: len(set(level)) == 1, zip(*(p[:-1] for p in parts), strict=False))))
    return [str(Path(*p[shared:])) for p in parts]


def report(argv: list[str]) -> None:
    """Parse and run `specauf report`."""
    run_function(report_command, argv, positional="runs")
