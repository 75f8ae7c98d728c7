"""No validation is lost when a run ends in the middle of it, none comes in the middle of a step or has no documents."""

from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn

from specauf.errors import UserError


class WholeValidations(L.Callback):
    """Runs the validation that the checkpoint of a resumed run was written before; Lightning would leave it out."""

    def __init__(self) -> None:
        self._due = False
        self._max_steps = -1

    def state_dict(self) -> dict[str, Any]:
        """Whether a validation had begun; nothing otherwise."""
        return {"due": True} if self._due else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From the checkpoint."""
        self._due = state_dict["due"]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Have Lightning come to `on_train_start` even when the run has made all of its steps."""
        self._max_steps = trainer.fit_loop.epoch_loop.max_steps
        if self._due:
            trainer.fit_loop.epoch_loop.max_steps = -1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Run what is due; the counters stand as they stood when it began, so it is logged at the same step.

        Raises:
            UserError: validations would come in the middle of a step, or have nothing to validate on.
        """
        trainer.fit_loop.epoch_loop.max_steps = self._max_steps
        _require_whole_steps(trainer)
        validation = trainer.fit_loop.epoch_loop.val_loop
        if trainer.enable_validation and trainer.val_dataloaders is None:  # the first is epochs away
            trainer.validating = True
            validation.setup_data()
            trainer.training = True
        if not self._due:
            return
        validation.restarting = False  # the one before it in this epoch was whole
        trainer.validating = True
        validation.run()
        trainer.training = True
        validation._has_run = False  # as after a checkpoint from behind it, whose way through the loops is exact
        self._due = False  # also when the run goes on without validation

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """A checkpoint of a callback behind this one is from before the validation that follows, too."""
        fit = trainer.fit_loop
        self._due = fit.epoch_loop._should_check_val_fx(fit._data_fetcher)  # type: ignore[arg-type]

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """From here on a checkpoint is one from before its validation."""
        self._due = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Done."""
        self._due = False


def _require_whole_steps(trainer: L.Trainer) -> None:
    """Refuse validations between the accumulated batches of a step: no checkpoint holds the gradients so far.

    Raises:
        UserError: there would be some.
    """
    accumulate, every = trainer.accumulate_grad_batches, trainer.val_check_batch
    if accumulate == 1 or not trainer.enable_validation or every == trainer.num_training_batches:
        return
    # Counted through from the start, or else within each epoch.
    epochs_count = trainer.check_val_every_n_epoch is None and trainer.num_training_batches % accumulate > 0
    if every is None or every % accumulate or epochs_count:
        found = "a time" if every is None else f"every {every} batches"
        raise UserError(
            f"trainer.val_check_interval is {found} but trainer.accumulate_grad_batches is {accumulate}: give a "
            f"multiple of {accumulate}, so that validations come between two steps"
        )
