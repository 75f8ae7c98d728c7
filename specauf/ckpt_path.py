"""Which checkpoint file `--ckpt_path` means: a file, a run directory, or Lightning's words `last` and `best`."""

import os
from pathlib import Path

from specauf.checkpoint import load_checkpoint
from specauf.errors import UserError


def checkpoint_file(given: str, folder: Path | None, *, fit: bool) -> str:
    """The file to go on from (`fit`), or to validate.

    Args:
        given: what `--ckpt_path` says.
        folder: where this run's checkpoints go; None for a new directory.
        fit: a run directory means its last state, otherwise its best weights.

    Raises:
        UserError: there is no such checkpoint.
    """
    if given == "hpc" or given.startswith("registry"):  # Lightning's words for what SLURM and LitModels keep
        return given
    if given in ("last", "best"):
        if folder is None:
            raise UserError(f"--ckpt_path={given} but trainer.default_root_dir names no run: give --ckpt_path=RUN")
        if not (folder / f"{given}.ckpt").is_file():
            raise UserError(
                f"--ckpt_path={given} but {folder}/{given}.ckpt does not exist: leave it out to start a new run, or "
                "give the directory of another as --ckpt_path=RUN"
            )
        return str(folder / f"{given}.ckpt")
    path = Path(given)
    if path.is_dir():
        names = ("last.ckpt",) if fit else ("best.ckpt", "last.ckpt")
        found = [file for name in names for file in (path / "checkpoints" / name, path / name) if file.is_file()]
        if not found:
            raise UserError(f"--ckpt_path={given} holds no checkpoints/last.ckpt: give a run directory or a .ckpt file")
        return str(found[0])
    if not path.is_file():
        raise UserError(f"--ckpt_path={given} does not exist: give RUN/checkpoints/last.ckpt")
    if path.suffix != ".ckpt":  # those with it are looked at in any case
        load_checkpoint(path)
    return given


def after_restart(folder: Path | None) -> str | None:
    """The last checkpoint, where SLURM or torchrun has started this very command again: nobody is there to name it.

    Not the file that Lightning writes when SLURM's signal comes, which may be from the middle of a step.

    Args:
        folder: where this run's checkpoints go; None for a new directory.
    """
    counts = (os.environ.get(name, "0") for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))
    if folder is None or all(count == "0" for count in counts) or not (folder / "last.ckpt").is_file():
        return None
    return str(folder / "last.ckpt")
