"""The directory a run goes to: its name when none is given, and what is refused before anything is written there."""

import contextlib
import os
from pathlib import Path

from specauf.callbacks.summary import SUMMARY
from specauf.cli import default_run_directory
from specauf.errors import UserError

_ENVIRONMENT = "SPECAUF_RUN_DIRECTORY"


def new_run_directory() -> str:
    """A new directory; ranks that Lightning starts from this process inherit its name through the environment."""
    inherited = os.environ.get(_ENVIRONMENT) if os.environ.get("LOCAL_RANK", "0") != "0" else None
    name = inherited or str(default_run_directory("drafter"))
    os.environ[_ENVIRONMENT] = name
    return name


def remove_empty() -> None:
    """Take the new directory away again if its run has left nothing there: it was refused, or writes nothing."""
    made = os.environ.get(_ENVIRONMENT)
    if made:
        with contextlib.suppress(OSError):
            Path(made).rmdir()
            Path(made).parent.rmdir()


def require_local(root: str, checkpoints: str | None) -> None:
    """Refuse URLs, which would become directories of that name here.

    Raises:
        UserError: naming the option.
    """
    for name, given in (("trainer.default_root_dir", root), ("checkpoints.directory", checkpoints)):
        if "://" in str(given):
            raise UserError(f"{name} is {given}: give a directory of a file system, and copy the run when it has ended")


def require_writable(root: Path) -> None:
    """Refuse a run directory that cannot be made, before anything else is done.

    Raises:
        UserError: it, or what it would stand in, is no directory or cannot be written.
    """
    near = next(path for path in (root, *root.parents) if path.exists())
    if not near.is_dir() or not os.access(near, os.W_OK):
        what = "cannot be written" if near.is_dir() else "is a file"
        raise UserError(f"trainer.default_root_dir is {root} but {near} {what}: choose another directory")


def refuse_second_run(root: Path, checkpoints: Path, *, resumed: Path | None = None) -> None:
    """Refuse to start a run where one has come to a checkpoint or to its end, or to go on there with another's.

    Args:
        root: run directory.
        checkpoints: where this run's go.
        resumed: the one to go on from.

    Raises:
        UserError: naming the directory and what would go on there.
    """
    mine = None if resumed is None else resumed.resolve().parent
    if mine == checkpoints.resolve():
        return
    for folder in (checkpoints, root / "checkpoints"):
        if folder.resolve() != mine and any(folder.glob("*.ckpt")):
            inside = folder == root / "checkpoints"
            what = f"run directory {root}" if inside else f"checkpoints.directory {folder}"
            flag = "--trainer.default_root_dir" if inside else "--checkpoints.directory"
            found = next((f for f in (folder / "last.ckpt", folder / "best.ckpt") if f.is_file()), None)
            on = "" if found is None else f"go on with --ckpt_path={found}, or "
            raise UserError(f"{what} already holds a run: {on}choose another {flag}")
    if (root / SUMMARY).exists() and mine != (root / "checkpoints").resolve():
        raise UserError(
            f"run directory {root} already holds a run, which has ended well ({SUMMARY}): go on with --ckpt_path and "
            "its last checkpoint, or choose another --trainer.default_root_dir"
        )
