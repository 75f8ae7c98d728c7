"""Checkpoints: the best tau, and always a recent state to go on from."""

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from specauf.errors import UserError


class Checkpoints(ModelCheckpoint):
    """Keeps `best.ckpt` by validation tau and `last.ckpt`, the only one in a run that does not validate.

    `last.ckpt` is written every `every_n_steps` steps, at the end of each epoch and of training, before and after each
    validation, and when the process is asked to end (SIGTERM, which SLURM sends before it kills). It is never written
    in `on_train_epoch_end`: from what Lightning saves there it goes on with a single batch of the next epoch. Nor
    during a validation: averaged weights stand in the place of the trained ones then.

    Args:
        every_n_steps: optimizer steps between writes of `last.ckpt`; what a kill -9 costs at most.
        directory: where they go; `checkpoints` in the run directory when null.
    """

    def __init__(self, every_n_steps: int = 500, directory: str | None = None) -> None:
        if every_n_steps < 1:
            raise UserError(f"checkpoints.every_n_steps is {every_n_steps}: give at least 1")
        super().__init__(
            dirpath=directory,
            filename="best",
            monitor="val/tau",
            mode="max",
            save_on_train_epoch_end=False,
            save_last=True,
            enable_version_counter=False,
        )
        self.every_n_steps = every_n_steps
        self._saved_step = -1

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the run directory, and whether there is a tau to choose by."""
        if self.dirpath is None:
            self.dirpath = str(Path(trainer.default_root_dir) / "checkpoints")
        if trainer.limit_val_batches == 0:
            self.monitor, self.save_top_k = None, 0
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A resumed run has its last step saved."""
        super().on_train_start(trainer, pl_module)
        self._saved_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save every `every_n_steps` steps and at the end of an epoch or run."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        # The run's end too, for in `on_train_end` averaged weights have taken the place of the trained ones.
        ends = trainer.is_last_batch or trainer.fit_loop.done
        if trainer.global_step != self._saved_step and (ends or trainer.global_step % self.every_n_steps == 0):
            self._save_last(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save `last.ckpt`, which goes on with this validation."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._save_last(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save `best.ckpt` if tau has improved, `last.ckpt` in any case."""
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        if trainer.global_step != self._last_global_step_saved:  # Lightning writes both
            self._save_last(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Nothing: the last step has been saved."""

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Save when asked to end between two batches; after any other exception the state may be half changed."""
        stopped = isinstance(exception, SIGTERMException) and trainer.training
        if stopped and trainer.global_step != self._saved_step:
            self._save_last(trainer)

    def _save_last(self, trainer: L.Trainer) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        assert self.dirpath is not None
        trainer.save_checkpoint(Path(self.dirpath) / "last.ckpt")
        # Not `_last_global_step_saved`: setting it would keep Lightning from saving `best.ckpt` at this step.
        self._saved_step = trainer.global_step
