"""Progress for anything that takes over three seconds: a bar on a terminal, a line now and then in a pipe."""

import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

SECONDS_BETWEEN_LINES = 20.0


@runtime_checkable
class Advance(Protocol):
    """Report progress: `advance(3)` adds 3 units, `advance(3, note="tau 1.6")` also shows a note."""

    def __call__(self, units: float | int = 1, *, note: str = "") -> None:
        """Add `units` of work done."""


class _Rate(ProgressColumn):
    """Units a second since the start."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        unit = task.fields["unit"]
        return Text("" if not speed else rate_text(speed, unit), style="progress.data.speed")


class _Note(ProgressColumn):
    """What was said last, as far as the line has room."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["note"], no_wrap=True, overflow="ellipsis")


def rate_text(rate: int | float, unit: str) -> str:
    """Units a second, or seconds a unit where those are more than one."""
    return f"{rate:,.1f} {unit}/s" if rate >= 1 else f"{1 / rate:,.1f} s/{unit.removesuffix('s')}"


@contextmanager
def progress(
    description: str, total: int | float | None, *, unit: str = "it", initial: int | float = 0
) -> Iterator[Advance]:
    """Show progress of `total` units under `description` on stderr, with rate and time left.

    Args:
        description: what is being done, in three words.
        total: units of work; None or infinity when it is not known.
        unit: what is counted, for the rate.
        initial: units already done, by an earlier run that was interrupted.
    """
    if total is not None and math.isinf(total):
        total = None
    if sys.stderr.isatty():
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            _Rate(),
            TimeRemainingColumn(),
            _Note(),
        )
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(description, total=total, completed=int(initial), unit=unit, note="")

            def advance_bar(units: float | int = 1, *, note: str = "") -> None:
                bar.update(task, advance=units, note=note)

            yield advance_bar
    else:
        yield _line_writer(description, total, unit, initial)


def _line_writer(description: str, total: int | float | None, unit: str, initial: int | float) -> Advance:
    started = last = time.monotonic()
    done = initial
    quiet = os.environ.get("CI", "").lower() in ("1", "true")

    def advance(units: float | int = 1, *, note: str = "") -> None:
        nonlocal last, done
        done += units
        now = time.monotonic()
        finished = total is not None and done >= total
        if quiet or (now - last < SECONDS_BETWEEN_LINES and not (finished and now - started > 3)):
            return
        last = now
        rate = max(done - initial, 1e-9) / max(now - started, 1e-9)
        left = f", {(total - done) / rate:,.0f} s left" if total is not None and rate > 0 and not finished else ""
        of = f"/{total:,.0f}" if total is not None else ""
        end = f"  {note}" if note else ""
        print(f"{description}: {done:,.0f}{of} {unit}, {rate_text(rate, unit)}{left}{end}", file=sys.stderr, flush=True)

    return advance
