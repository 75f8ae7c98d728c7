"""Running `specauf fit` in this process or in one of its own, and reading what it logged."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import torch

from specauf.cli import main
from tests.processes import afresh, forked


def arguments(cache: Path, run: Path, *options: str) -> list[str]:
    return [
        "fit", "-c", "fit", f"--data.cache={cache}", f"--trainer.default_root_dir={run}", "--data.batch_size=4",
        "--data.anchors_per_document=3", "--trainer.log_every_n_steps=1", "--trainer.accelerator=cpu", *options,
    ]  # fmt: skip


def fit_here(cache: Path, run: Path, *options: str) -> int:
    """In this process; returns the exit status."""
    return _here(arguments(cache, run, *options))


def validate_here(cache: Path, run: Path, *options: str) -> int:
    """The run's last checkpoint on some cache, in this process; returns the exit status."""
    words = ["-c", f"{run}/config.yaml", f"--ckpt_path={run}/checkpoints/last.ckpt", f"--data.cache={cache}"]
    return _here(["validate", *words, *options])


def _here(words: list[str]) -> int:
    # A strategy says in the environment which rank this is, and a later test's processes would believe it.
    argv, environment = sys.argv, dict(os.environ)
    try:
        return main(words)
    finally:
        sys.argv = argv
        if torch.distributed.is_initialized():  # by a strategy, which would leave it to the next test
            torch.distributed.destroy_process_group()
        os.environ.clear()
        os.environ.update(environment)


def fit(cache: Path, run: Path, *options: str, code: str | None = None) -> "subprocess.CompletedProcess[str]":
    """In a process of its own; `code` takes the place of the command."""
    return forked(command, arguments(cache, run, *options), code)


def command(words: list[str], code: str | None = None) -> None:
    """What a forked process does: `specauf WORDS`, or the code with these words."""
    sys.argv = ["specauf", *words]
    if code is None:
        sys.exit(main())
    exec(compile(code, "code", "exec"), {"__name__": "__main__"})


def fit_afresh(cache: Path, run: Path, *options: str, code: str | None = None) -> "subprocess.CompletedProcess[str]":
    """As `fit`, in an interpreter of its own, as users run it."""
    return afresh(*(["-m", "specauf"] if code is None else ["-c", code]), *arguments(cache, run, *options))


def logged(run: Path, name: str = "train/loss") -> dict[int, float]:
    """A metric of a run by step (0-based)."""
    with (run / "metrics.csv").open() as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row.get(name)}
