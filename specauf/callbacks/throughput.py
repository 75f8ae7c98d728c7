"""How fast training goes and how long it waits for data."""

import time
from typing import Any

import lightning as L

from specauf.data.batch import BlockBatch


class Throughput(L.Callback):
    """Logs blocks and tokens a second and the share of time spent waiting for the next batch.

    Args:
        every_n_steps: steps each logged figure is averaged over.
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        self.every_n_steps = every_n_steps
        self._reset()

    def _reset(self) -> None:
        self._blocks = self._tokens = self._steps = 0
        self._waited = 0.0
        self._since = self._ready = time.perf_counter()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._reset()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: BlockBatch, batch_idx: int
    ) -> None:
        """The batch has arrived: what passed since the last step's end was waiting."""
        self._waited += time.perf_counter() - self._ready

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: BlockBatch, batch_idx: int
    ) -> None:
        """Count the step; log every `every_n_steps`."""
        self._blocks += len(batch.anchors)
        self._tokens += len(batch.tokens)
        self._steps += 1
        self._ready = time.perf_counter()
        if self._steps == self.every_n_steps:
            elapsed = self._ready - self._since
            pl_module.log_dict(
                {
                    "speed/blocks_per_second": self._blocks / elapsed,
                    "speed/tokens_per_second": self._tokens / elapsed,
                    "speed/data_wait_share": self._waited / elapsed,
                }
            )
            self._reset()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validation is neither training nor waiting."""
        self._reset()
