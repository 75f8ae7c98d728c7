"""Checkpoints: the best tau, and always the state training ended in."""

from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint


class Checkpoints(ModelCheckpoint):
    """Keeps `best.ckpt` by validation tau and `last.ckpt`.

    Lightning saves at validation only; a run that ends by `max_steps` in mid-epoch would lose its last steps.

    Args:
        directory: where the checkpoints go.
        validates: the run validates; without it `final.ckpt` takes the place of `best.ckpt`.
    """

    def __init__(self, directory: str, *, validates: bool) -> None:
        super().__init__(
            dirpath=directory,
            filename="best" if validates else "final",
            monitor="val/tau" if validates else None,
            mode="max",
            save_last=True,
            enable_version_counter=False,
        )

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the end of training if it was not saved already."""
        super().on_train_end(trainer, pl_module)
        if self._last_global_step_saved != trainer.global_step:
            assert self.dirpath is not None
            trainer.save_checkpoint(Path(self.dirpath) / "last.ckpt")
