"""Lightning's CSV log, without its habit of deleting the log of the run that is resumed."""

from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only


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
        return self.directory / f"metrics-{len(list(self.directory.glob('metrics-*.csv'))) + 1}.csv"

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
