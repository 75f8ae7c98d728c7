"""How a training run ends early: what Lightning raises for wrong settings, a full disk and signals, in one line each.

Errors of our own code, and of any other than Lightning's, keep their traceback.
"""

import contextlib
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import jsonargparse
import lightning as L
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    Callback,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from torch.multiprocessing import ProcessRaisedException

from specauf.callbacks import Checkpoints
from specauf.drafters import DominoSpec
from specauf.errors import DISK_FULL, UserError
from specauf.module import DrafterModule

_OTHERS = [Path(str(module.__file__)).parent for module in (L, jsonargparse)]


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn a full disk, and what the code of Lightning and of its command line raises, into one line.

    Raises:
        UserError: with what was raised.
        SystemExit: another rank has ended, of what it says itself.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise UserError(
            f"trainer.default_root_dir: writing failed ({error.strerror}); a checkpoint that was there is whole: free "
            "some space and go on with --ckpt_path=RUN/checkpoints/last.ckpt"
        ) from error
    except MisconfigurationException as error:
        raise _refused(error) from error
    except ProcessRaisedException as error:  # of a rank that this process has forked or spawned
        _, ours, said = str(error).partition(f"{UserError.__module__}.{UserError.__qualname__}: ")
        if not ours:
            raise
        raise UserError(said.strip().splitlines()[0]) from error
    except (ValueError, RuntimeError, AttributeError) as error:
        if "gloo" in str(error) and "by peer" in str(error):
            raise SystemExit(
                "error: another rank has ended, whose own message says why: mend that, and go on with "
                "--ckpt_path=RUN/checkpoints/last.ckpt"
            ) from error
        # Not their subclasses: an error of CUDA or of a decoder may surface in any frame.
        if type(error) not in (ValueError, RuntimeError, AttributeError) or _raised_in(error) is None:
            raise
        raise _refused(error) from error


def _refused(error: Exception) -> UserError:
    where = _raised_in(error)
    at = f" ({where})" if where else ""
    text = " ".join(str(error).split()).rstrip(".")
    return UserError(f"trainer: {text}{at}: correct that --trainer option or callback")


def _raised_in(error: Exception) -> str | None:
    """File and line of Lightning's or jsonargparse's that raised an error; None if other code did."""
    last: TracebackType | None = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None:
        return None
    file = Path(last.tb_frame.f_code.co_filename)
    where = next((other for other in _OTHERS if file.is_relative_to(other)), None)
    return None if where is None else f"{file.relative_to(where.parent)}:{last.tb_lineno}"


@contextlib.contextmanager
def one_line_signals(trainer: L.Trainer) -> Iterator[None]:
    """Answer SIGTERM and Ctrl-C during a run with how to go on, and the exit status a shell gives for the signal.

    Args:
        trainer: that runs inside.

    Raises:
        SystemExit: 143 or 130.
    """
    try:
        yield
    except SIGTERMException as stopped:
        _say(trainer, "terminated")
        raise SystemExit(128 + signal.SIGTERM) from stopped
    except SystemExit as ended:
        if not isinstance(ended.__context__, KeyboardInterrupt):  # which Lightning turns into a status of 1
            raise
        _say(trainer, "interrupted")
        raise SystemExit(128 + signal.SIGINT) from ended


def _say(trainer: L.Trainer, what: str) -> None:
    if not trainer.is_global_zero:
        return
    folders = [c.dirpath for c in trainer.checkpoint_callbacks if isinstance(c, Checkpoints) and c.dirpath]
    last = next((file for file in (Path(f) / "last.ckpt" for f in folders) if file.is_file()), None)
    if trainer.state.fn != "fit":
        print(f"{what}: run the same command again", file=sys.stderr)
    elif last is None:
        print(f"{what} before the first checkpoint: run the same command again to start anew", file=sys.stderr)
    else:
        print(f"{what}: run the same command with --ckpt_path={last} to go on", file=sys.stderr)


_CALLBACKS: dict[type[Callback], str] = {
    LearningRateFinder: "cannot set model.optimizer: leave it out and compare runs with different "
    "--model.optimizer.init_args.lr",
    BatchSizeFinder: "cannot set data.batch_size: leave it out and lower --data.batch_size when memory ends",
    StochasticWeightAveraging: "would average nothing, for the drafter is made after it: leave it out and give "
    "-c configs/trainer/ema.yaml",
    GradientAccumulationScheduler: "neither the learning rate's schedule nor a resumed run follows: leave it out and "
    "give --trainer.accumulate_grad_batches",
    ModelPruning: "would prune nothing, for the drafter is made after it: leave it out",
    BaseFinetuning: "would freeze nothing, for the drafter is made after it: leave it out",
}


def check_trainer(config: Any, callbacks: Sequence[Callback]) -> None:
    """Refuse settings for which Lightning's own message would not help.

    Args:
        config: of the trainer.
        callbacks: those the user asked for.

    Raises:
        UserError: one of them is wrong.
    """
    every = config.check_val_every_n_epoch
    if every is not None and every < 1:
        raise UserError(
            f"trainer.check_val_every_n_epoch is {every}: give at least 1, or --trainer.limit_val_batches=0 for no "
            "validation"
        )
    if config.val_check_interval == 0:
        raise UserError(
            "trainer.val_check_interval is 0: give at least 1 batch, or --trainer.limit_val_batches=0 for no validation"
        )
    for name, value in (
        ("accumulate_grad_batches", config.accumulate_grad_batches),
        ("limit_train_batches", config.limit_train_batches),
    ):
        if value is not None and value <= 0:
            raise UserError(f"trainer.{name} is {value:g}, which trains nothing: give at least 1, or leave it out")
    if config.enable_checkpointing is False or config.barebones:
        found = "barebones is true" if config.barebones else "enable_checkpointing is false"
        raise UserError(f"trainer.{found}, but every run keeps last.ckpt: leave it out")
    for callback in callbacks:
        for kind, reason in _CALLBACKS.items():
            if isinstance(callback, kind):
                raise UserError(f"trainer.callbacks: {kind.__name__} found, which {reason}")
        watched = getattr(callback, "monitor", None)
        if config.limit_val_batches == 0 and str(watched).startswith("val/"):
            raise UserError(
                f"trainer.callbacks: {type(callback).__name__} monitors {watched}, but trainer.limit_val_batches is 0 "
                "and nothing is validated: leave one of them out"
            )


def check_length(trainer: L.Trainer, model: DrafterModule) -> None:
    """Refuse a run without end if its drafter's curriculum is spread over the run; its schedule sees to itself.

    Raises:
        UserError: it is.
    """
    endless = trainer.max_epochs == -1 and trainer.max_steps == -1
    if endless and isinstance(model.spec, DominoSpec) and model.spec.base_start > 0:
        raise UserError(
            "trainer.max_steps is -1 and so is trainer.max_epochs, but the domino drafter's base_ratio is a share of "
            "the run: give --trainer.max_steps=N, or --model.drafter.init_args.base_start=0"
        )
