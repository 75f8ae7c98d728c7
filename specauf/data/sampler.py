"""The order in which documents are read: the same global batches for any number of ranks and workers."""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler


class ShardBatchSampler(Sampler[list[int]]):
    """Batches of document numbers, shuffled by (seed, epoch) without leaving a small window of shards.

    Every rank computes the same global batches and takes its own slice of each, so 1 rank with batch 8 and 2 ranks with
    batch 4 see the same documents in the same step.

    Args:
        shards: the document numbers of each shard.
        batch_size: documents of a batch on one rank.
        shuffle: off gives the order of the cache.
        seed: of the order.
        window: shards mixed at once; more mixes better and needs more memory.
        drop_last: leave out the last, incomplete step of an epoch.
        accumulate: batches of a step, so that an epoch has the same steps however they are cut into batches.
        rank: which slice of each global batch.
        world: number of slices.
    """

    def __init__(
        self,
        shards: Sequence[Sequence[int]],
        batch_size: int,
        *,
        shuffle: bool,
        seed: int,
        window: int = 4,
        drop_last: bool = True,
        accumulate: int = 1,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.shards = [np.asarray(s, np.int64) for s in shards]
        self.batch_size, self.shuffle, self.seed, self.window = batch_size, shuffle, seed, window
        self.accumulate = accumulate
        self.drop_last, self.rank, self.world = drop_last, rank, world
        self.epoch = 0
        self.skip = 0

    def start_at(self, epoch: int, skip: int = 0) -> None:
        """Choose the epoch, and how many of its batches the next iteration leaves out."""
        self.epoch, self.skip = epoch, skip

    def order(self) -> np.ndarray:
        """All document numbers in this epoch's order."""
        if not self.shuffle:
            return np.concatenate(self.shards)
        rng = np.random.default_rng((self.seed, self.epoch))
        turn = rng.permutation(len(self.shards))
        windows = [turn[i : i + self.window] for i in range(0, len(turn), self.window)]
        return np.concatenate([rng.permutation(np.concatenate([self.shards[s] for s in w])) for w in windows])

    def __len__(self) -> int:
        documents, step = sum(len(s) for s in self.shards), self.batch_size * self.world
        if self.drop_last:
            return documents // (step * self.accumulate) * self.accumulate
        return -(-documents // step)

    def __iter__(self) -> Iterator[list[int]]:
        order, step = self.order(), self.batch_size * self.world
        first, self.skip = self.skip, 0
        for start in range(first * step, len(self) * step, step):
            batch = order[start : start + step]
            yield batch[self.rank :: self.world].tolist()
