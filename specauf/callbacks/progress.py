"""Training progress in the words of the other commands: steps, rate, time left, loss and tau."""

from contextlib import ExitStack
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar

from specauf.progress import Advance, progress


class TrainingProgress(ProgressBar):
    """A bar on a terminal, a line now and then in a pipe, nothing in CI."""

    def __init__(self) -> None:
        super().__init__()
        self._stack = ExitStack()
        self._advance: Advance | None = None
        self._enabled = True
        self._shown_steps = 0
        self._note = ""

    def disable(self) -> None:
        """Show nothing; Lightning calls this on ranks other than the first."""
        self._enabled = False

    def enable(self) -> None:
        """Show progress again."""
        self._enabled = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the bar at the step training goes on from."""
        self._shown_steps = trainer.global_step
        if self._enabled:
            total = trainer.estimated_stepping_batches
            self._advance = self._stack.enter_context(
                progress("training", float(total), unit="steps", initial=float(trainer.global_step))
            )

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Show the optimizer steps made; an accumulated batch makes none."""
        if self._advance is None:
            return
        made, self._shown_steps = trainer.global_step - self._shown_steps, trainer.global_step
        # To read them at every step would keep a GPU waiting for the next batch.
        every = trainer.log_every_n_steps or 1  # type: ignore[attr-defined]
        if not self._note or trainer.global_step % every == 0:
            found = trainer.callback_metrics
            self._note = "  ".join(f"{name} {float(found[key]):.3f}" for name, key in _SHOWN if key in found)
        self._advance(made, note=self._note)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Close the bar."""
        self._stack.close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Close the bar, so that the message stands alone."""
        self._stack.close()


_SHOWN = (("loss", "train/loss"), ("support", "train/support_ratio"), ("tau", "val/tau"))
