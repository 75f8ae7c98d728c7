"""How fast training goes and how long it waits for data."""

import time
from typing import Any

import lightning as L

from specauf.data.batch import BlockBatch
from specauf.data.loader import BlockLoader
from specauf.errors import UserError


class Throughput(L.Callback):
    """Logs blocks and tokens a second and the share of time spent waiting for the next batch.

    Args:
        every_n_steps: batches each logged figure is averaged over.

    Attributes:
        busy_seconds: time all logged figures cover.
        waited_seconds: the part of it spent waiting for data.
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        if every_n_steps < 1:
            raise UserError(f"every_n_steps of Throughput is {every_n_steps}: give at least 1")
        self.every_n_steps = every_n_steps
        self._waited = self.busy_seconds = self.waited_seconds = 0.0
        self._reset()

    def _reset(self) -> None:
        self._blocks = self._tokens = self._steps = 0
        self._waited_before = self._waited
        self._since = time.perf_counter()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._reset()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: BlockBatch, batch_idx: int
    ) -> None:
        """The loader itself counts how long it was waited for."""
        loader = trainer.train_dataloader
        assert isinstance(loader, BlockLoader)
        self._waited = loader.waited

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: BlockBatch, batch_idx: int
    ) -> None:
        """Count the step; log every `every_n_steps`."""
        self._blocks += len(batch.anchors)
        self._tokens += len(batch.tokens)
        self._steps += 1
        if self._steps == self.every_n_steps:
            elapsed, waited = time.perf_counter() - self._since, self._waited - self._waited_before
            self.busy_seconds += elapsed
            self.waited_seconds += waited
            pl_module.log_dict(
                {
                    "speed/blocks_per_second": self._blocks / elapsed,
                    "speed/tokens_per_second": self._tokens / elapsed,
                    "speed/data_wait_share": waited / elapsed,
                }
            )
            self._reset()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validation is neither training nor waiting."""
        self._reset()
