"""What a run came to, in a line and in a file, written when training has ended well: the file means a finished run."""

import json
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch

from specauf.cache.location import write_atomically
from specauf.callbacks.checkpoints import Checkpoints
from specauf.callbacks.throughput import Throughput

SUMMARY = "summary.json"


class Summary(L.Callback):
    """Writes `summary.json` into the run directory at the end of training, and says where the run is.

    Fields: steps, tau (the last validation's), best_tau, best_step, loss (the last step's), seconds (of training, up to
    the checkpoint that the run went on from too), data_wait_share (of this process).
    """

    def __init__(self) -> None:
        self.best_tau: float | None = None
        self.best_step = 0
        self._tau: float | None = None
        self._loss: float | None = None
        self._seconds_before = 0.0
        self._started: float | None = None
        self._trainer: L.Trainer | None = None
        self._seen: dict[str, float] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Where the last loss is found; what the checkpoint's callbacks could see, those of a resumed run can."""
        self._trainer = trainer
        # A checkpoint from behind a validation goes on with the end of its epoch, where EarlyStopping looks.
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in self._seen.items()})

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """A run that goes on is not finished any more; one that has nothing left to do is."""
        if self._started is None:
            self._started = time.monotonic()
            if trainer.is_global_zero:
                (Path(trainer.default_root_dir) / SUMMARY).unlink(missing_ok=True)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the best tau."""
        if trainer.sanity_checking or "val/tau" not in trainer.callback_metrics:
            return
        self._tau = float(trainer.callback_metrics["val/tau"])
        if self.best_tau is None or self._tau > self.best_tau:
            self.best_tau, self.best_step = self._tau, trainer.global_step

    def state_dict(self) -> dict[str, Any]:
        """What is known so far, for the checkpoint."""
        known = {"tau": self._tau, "loss": self._last_loss(), "seconds": self._seconds()}
        seen = {} if self._trainer is None else {k: float(v) for k, v in self._trainer.callback_metrics.items()}
        return {"best_tau": self.best_tau, "best_step": self.best_step, **known, "seen": seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What was known at the checkpoint; early ones hold the best alone."""
        self.best_tau, self.best_step = state_dict["best_tau"], state_dict["best_step"]
        self._tau, self._loss = state_dict.get("tau"), state_dict.get("loss")
        self._seconds_before = state_dict.get("seconds", 0.0)
        self._seen = state_dict.get("seen", {})

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the file; the last checkpoint has been written by now."""
        file = Path(trainer.default_root_dir) / SUMMARY
        if not trainer.is_global_zero:
            return
        print(self._said(trainer), flush=True)
        if self._started is None and file.exists():  # nothing was left to do
            return
        speed = next((c for c in trainer.callbacks if isinstance(c, Throughput)), None)  # type: ignore[attr-defined]
        record = {
            "steps": trainer.global_step,
            "tau": self._tau,
            "best_tau": self.best_tau,
            "best_step": self.best_step if self.best_tau is not None else None,
            "loss": self._last_loss(),
            "seconds": self._seconds(),
            "data_wait_share": speed.waited_seconds / speed.busy_seconds if speed and speed.busy_seconds else None,
        }
        write_atomically(file, (json.dumps(record, indent=2) + "\n").encode())  # half of one would mean a finished run

    def _said(self, trainer: L.Trainer) -> str:
        root, steps = trainer.default_root_dir, trainer.global_step
        if self._started is None:
            ends = "max_epochs, max_steps or max_time" if trainer.should_stop else "max_epochs or max_steps"
            return f"{root}: nothing left to do after {steps} steps; raise trainer.{ends} to go on"
        said = [f"{steps} steps"]
        if trainer.current_epoch == trainer.max_epochs and steps < trainer.max_steps:
            said[0] += f" (trainer.max_epochs {trainer.max_epochs} came before max_steps {trainer.max_steps})"
        if self.best_tau is not None:
            said.append(f"best tau {self.best_tau:.3f} at step {self.best_step}")
        target = trainer.datamodule.cache.manifest.identity.target["id"]  # type: ignore[attr-defined]
        kept = next((c.dirpath for c in trainer.checkpoint_callbacks if isinstance(c, Checkpoints)), None)
        drafter = root
        if kept is not None and Path(kept) != Path(root) / "checkpoints":
            drafter = str(Path(kept) / ("last.ckpt" if self.best_tau is None else "best.ckpt"))
        return f"{root}: {', '.join(said)}\n  next: specauf evaluate {drafter} --target {target}"

    def _last_loss(self) -> float | None:
        """This process's last, which is read only when asked for; a GPU would be waited for at every step."""
        found = {} if self._trainer is None else self._trainer.callback_metrics
        return float(found["train/loss"]) if "train/loss" in found else self._loss

    def _seconds(self) -> float:
        return self._seconds_before + (0.0 if self._started is None else time.monotonic() - self._started)
