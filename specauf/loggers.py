"""Lightning's CSV log, without its habit of deleting that of a resumed run, and metrics that not every step has."""

import re
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor


class MetricsLog(CSVLogger):
    """`metrics.csv` in the run directory; an earlier one becomes `metrics-N.csv` once there is something new to log.

    So a run that is refused before its first step leaves the log as it was.

    Args:
        directory: of the run.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, name="", version="")
        self.directory, self._begun = directory, False

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """Lightning's writer, which it makes before a run is checked, and which deletes what it finds."""
        if self._experiment is None and self._found.exists():
            aside = self._found.rename(self._next_name())
            super().experiment  # noqa: B018  (makes it)
            aside.rename(self._found)
        return super().experiment

    @property
    def _found(self) -> Path:
        return self.directory / "metrics.csv"

    def _next_name(self) -> Path:
        found = (re.fullmatch(r"metrics-(\d+)\.csv", path.name) for path in self.directory.glob("metrics-*.csv"))
        # Above the highest: a count would come to a name that is taken once an earlier one is deleted.
        return self.directory / f"metrics-{max((int(name[1]) for name in found if name), default=0) + 1}.csv"

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Write one row."""
        if not self._begun:
            self._begun = True
            if self._found.exists():
                self._found.rename(self._next_name())
        super().log_metrics(metrics, step)

    @rank_zero_only
    def save(self) -> None:
        """Write what was logged, if anything."""
        if self._begun:
            super().save()


def log_when_measured(
    module: L.LightningModule, summary: dict[str, Tensor], name: str, batch_idx: int, *, at_once: bool
) -> None:
    """Take a metric that not every step measures out of `summary` and log it, if it is there, at this step alone.

    `LightningModule.log` shows the last value again at every step that is logged until the epoch ends.

    Args:
        module: in its `training_step`.
        summary: what was measured.
        name: of the metric.
        batch_idx: of the batch, within the epoch.
        at_once: log it though `log_every_n_steps` does not choose this step.
    """
    if name not in summary:
        return
    value, trainer = summary.pop(name), module.trainer
    module.log(name, value, logger=False)  # for callbacks that watch it
    last_of_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch
    every = trainer.log_every_n_steps  # type: ignore[attr-defined]
    if last_of_step and (at_once or (every and (module.global_step + 1) % every == 0)):
        for logger in trainer.loggers:
            logger.log_metrics({name: float(value), "epoch": trainer.current_epoch}, step=module.global_step)
