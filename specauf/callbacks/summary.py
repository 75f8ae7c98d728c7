"""What a run came to, in one file, written when training has ended well: so its presence means a finished run."""

import json
import time
from pathlib import Path
from typing import Any

import lightning as L

from specauf.callbacks.throughput import Throughput

SUMMARY = "summary.json"


class Summary(L.Callback):
    """Writes `summary.json` into the run directory at the end of training.

    Fields: steps, tau (the last validation's), best_tau, best_step, loss (the last step's), seconds (of this process,
    resumed or not), data_wait_share.
    """

    def __init__(self) -> None:
        self.best_tau: float | None = None
        self.best_step = 0
        self._started = time.monotonic()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A run that goes on is not finished any more."""
        self._started = time.monotonic()
        if trainer.is_global_zero:
            (Path(trainer.default_root_dir) / SUMMARY).unlink(missing_ok=True)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the best tau."""
        tau = trainer.callback_metrics.get("val/tau")
        if tau is not None and (self.best_tau is None or float(tau) > self.best_tau):
            self.best_tau, self.best_step = float(tau), trainer.global_step

    def state_dict(self) -> dict[str, Any]:
        """Best so far, for the checkpoint."""
        return {"best_tau": self.best_tau, "best_step": self.best_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Best so far, from the checkpoint."""
        self.best_tau, self.best_step = state_dict["best_tau"], state_dict["best_step"]

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the file; the last checkpoint has been written by now."""
        if not trainer.is_global_zero:
            return
        metrics = trainer.callback_metrics
        speed = next((c for c in trainer.callbacks if isinstance(c, Throughput)), None)  # type: ignore[attr-defined]
        record = {
            "steps": trainer.global_step,
            "tau": float(metrics["val/tau"]) if "val/tau" in metrics else None,
            "best_tau": self.best_tau,
            "best_step": self.best_step if self.best_tau is not None else None,
            "loss": float(metrics["train/loss"]) if "train/loss" in metrics else None,
            "seconds": time.monotonic() - self._started,
            "data_wait_share": speed.waited_seconds / speed.busy_seconds if speed and speed.busy_seconds else None,
        }
        (Path(trainer.default_root_dir) / SUMMARY).write_text(json.dumps(record, indent=2) + "\n")
