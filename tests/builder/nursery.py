"""A process that has everything imported and forks a builder for each line it is asked with, to be killed.

    python -m tests.builder.nursery

Each line of standard input is JSON: `build`, the fields of a `BuildConfig`, and how the builder ends: by itself, by
SIGKILL after `seconds`, or by SIGKILL when it stores its `nth` object whose name matches `pattern`, at a `moment` of
that: `empty` (a temporary file is there), `half` (half of its bytes are), `whole` (all of them), `renamed` (it has its
name). With `signal` it is that one in the place of SIGKILL, and with `says` the builder's errors go to that file.
Answers with a line of JSON for each: `status`, what `waitpid` says, and the builder's `seconds`.
"""

import json
import os
import re
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from cache_builder.config import BuildConfig
from cache_builder.driver import build
from cache_builder.sigterm import sigterm_interrupts
from specauf.errors import run_command
from specauf.targets import TargetConfig


def kill_at(pattern: str, nth: int, moment: str, name_of_signal: str = "SIGKILL") -> None:
    """Die at a moment of the nth matching object; every object is flushed once, and then its directory is."""

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


def run(order: dict[str, Any]) -> int:
    """A builder's whole life, and its exit status."""
    if "says" in order:
        os.dup2(os.open(order["says"], os.O_WRONLY | os.O_CREAT), 2)
    os.dup2(2, 1)
    if "pattern" in order:
        kill_at(order["pattern"], order["nth"], order["moment"], order.get("signal", "SIGKILL"))
    settings = order["build"]
    target = settings.pop("target")
    config = BuildConfig(TargetConfig(**target | {"taps": tuple(target["taps"])}), **settings)
    with sigterm_interrupts():
        return run_command(lambda: build(config))


def main() -> None:
    """Answer until the input ends."""
    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        order, started = json.loads(line), time.monotonic()
        child = os.fork()
        if child == 0:
            try:
                status = run(order)
            except BaseException:  # noqa: BLE001 -- a forked child must end here, whatever happened
                traceback.print_exc()
                os._exit(1)
            os._exit(status)
        if "seconds" in order:
            time.sleep(order["seconds"])
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        print(json.dumps({"status": status, "seconds": time.monotonic() - started}), flush=True)


if __name__ == "__main__":
    main()
