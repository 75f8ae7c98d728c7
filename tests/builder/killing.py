"""Builds that are killed when they store a certain object; see `tests.processes` for where they run."""

import os
import re
import signal
import sys
from pathlib import Path

from cache_builder.config import BuildConfig
from cache_builder.driver import build
from specauf.errors import run_command
from specauf.sigterm import sigterm_interrupts


def kill_at(pattern: str, nth: int, moment: str, name_of_signal: str = "SIGKILL") -> None:
    """Die at a moment of the nth matching object; every object is flushed once, and then its directory is.

    Args:
        pattern: of its path.
        nth: from 1.
        moment: `empty` (its temporary file is there), `half` (and half of its bytes), `whole` (all of them), `renamed`
            (it has its name).
        name_of_signal: that it dies of.
    """

    def die() -> None:
        os.kill(os.getpid(), signal.Signals[name_of_signal])

    flush, seen, named = os.fsync, 0, False

    def fsync(descriptor: int) -> None:
        nonlocal seen, named
        path = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        name = re.sub(r"\.specauf-tmp-\d+$", "", path)
        if named:
            named = False
            die()
        if name != path and re.search(pattern, name):
            seen += 1
            if seen == nth:
                if moment == "renamed":
                    named = True
                else:
                    size = os.fstat(descriptor).st_size
                    os.ftruncate(descriptor, {"empty": 0, "half": size // 2, "whole": size}[moment])
                    die()
        flush(descriptor)

    os.fsync = fsync  # type: ignore[assignment]


def whole_life(config: BuildConfig, *killed: str | int) -> None:
    """A builder's, which `kill_at` ends early if that is called for."""
    if killed:
        kill_at(*killed)  # type: ignore[arg-type]
    with sigterm_interrupts():
        sys.exit(run_command(lambda: build(config)))
