"""The DataLoader of training: it knows its place in the data, so that a run goes on exactly where it was."""

import time
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from specauf.data.batch import BlockBatch
from specauf.data.sampler import ShardBatchSampler
from specauf.errors import UserError


class BlockLoader(DataLoader[BlockBatch]):
    """Batches of blocks whose position is kept in checkpoints; a `UserError` in the place of one is raised.

    Epochs are counted here: Lightning tells the epoch to a `sampler` only, and only after it has asked for the first
    iterator, when workers have read ahead already; and its own count skips one when a run goes on from the end of an
    epoch. The position counts batches that were handed out, not those that workers hold ready.

    Args:
        sampler: order of the documents.
        identity: what a position is valid for: batch size, ranks, seed, cache. Compared when a run is resumed.
        epoch_batches: batches of an epoch when the trainer takes fewer than there are; all when not given.
        options: of `torch.utils.data.DataLoader`.

    Attributes:
        waited: seconds spent waiting for batches since the loader was made.
    """

    def __init__(
        self, sampler: ShardBatchSampler, identity: dict[str, Any], epoch_batches: int | None = None, **options: Any
    ) -> None:
        super().__init__(batch_sampler=sampler, **options)
        self.order, self.identity = sampler, identity
        self.epoch_batches = len(sampler) if epoch_batches is None else epoch_batches
        self.waited = 0.0
        self._epoch = self._handed_out = self._skipped = 0
        self._resume: tuple[int, int] | None = None

    def __iter__(self) -> Iterator[BlockBatch]:  # type: ignore[override]
        """The next epoch's batches, or the rest of the resumed one; an iterator that gave nothing began no epoch."""
        epoch, skip = self._resume or (self._next_epoch, 0)
        self._resume = None
        self._epoch, self._handed_out, self._skipped = epoch, skip, skip
        self.order.start_at(epoch, skip)
        # Created here and not at the first `next`: workers start reading at once.
        return self._hand_out(super().__iter__(), epoch, skip)

    def _hand_out(self, batches: Iterator[BlockBatch | UserError], epoch: int, skip: int) -> Iterator[BlockBatch]:
        handed_out = skip
        while True:
            started = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self.waited += time.perf_counter() - started
            if isinstance(batch, UserError):
                raise batch
            handed_out += 1
            self._epoch, self._handed_out = epoch, handed_out
            yield batch

    @property
    def _next_epoch(self) -> int:
        return self._epoch + (self._handed_out > self._skipped)

    def begin_after(self, other: "BlockLoader") -> None:
        """Begin with the epoch after that which another loader has handed out last."""
        self._epoch = other._next_epoch

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it is a position in."""
        return {"epoch": self._epoch, "batches": self._handed_out, **self.identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved position; an epoch that was read to its end goes on with the next.

        Raises:
            UserError: it was saved with other data, batches or ranks.
        """
        for name, value in self.identity.items():
            # Early checkpoints do not say what the trainer's limit was.
            if state.get(name, value) != value:
                raise UserError(
                    f"the checkpoint was written with {name} {state[name]}, now {value}: "
                    "resume with the same settings, or start a new run"
                )
        epoch, batches = int(state["epoch"]), int(state["batches"])
        self._resume = (epoch, batches) if batches < self.epoch_batches else (epoch + 1, 0)
