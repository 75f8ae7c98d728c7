"""`specauf report`; needs no torch."""

from pathlib import Path
from typing import Any

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
    records: dict[str, dict[str, Any]] = {}
    for place in runs:
        source = place / EVALUATION if place.is_dir() else place
        records[str(place)] = read_record(source)
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


def report(argv: list[str]) -> None:
    """Parse and run `specauf report`."""
    run_function(report_command, argv, positional="runs")
