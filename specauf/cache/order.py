"""The order of an epoch, its split over readers, and a position in it that can be saved."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from specauf.cache.shard import Document, Shard
from specauf.errors import UserError

if TYPE_CHECKING:
    import specauf.cache.reader


class Epoch(Iterator[Document]):
    """One reader's documents of one epoch; made by `Cache.documents`.

    The epoch is one sequence of all documents, the same for any number of readers: shards in a drawn order, in windows,
    and the documents of each window in a drawn order. Reader r of w takes the r-th of w equal stretches of it.
    """

    def __init__(
        self,
        cache: "specauf.cache.reader.Cache",
        *,
        shuffle: bool,
        seed: int,
        epoch: int,
        split: str | None,
        rank: int,
        world: int,
        fields: tuple[str, ...],
        window: int,
    ) -> None:
        if not 0 <= rank < world:
            raise UserError(f"rank is {rank}, expected 0 to {world - 1} for world {world}")
        self.cache, self.fields = cache, fields
        self._seed = (seed, epoch)
        self._settings = {
            "cache": cache.fingerprint,
            "shuffle": shuffle,
            "seed": seed,
            "epoch": epoch,
            "split": split,
            "rank": rank,
            "world": world,
            "window": window,
        }
        turn = (
            np.random.default_rng((seed, epoch)).permutation(cache.num_shards) if shuffle else range(cache.num_shards)
        )
        shards = [int(s) for s in turn]
        self._windows = [shards[i : i + window] for i in range(0, len(shards), window)]
        sizes = [sum(self._count(s) for s in w) for w in self._windows]
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        total = int(self._starts[-1])
        self._first, self._stop = total * rank // world, total * (rank + 1) // world
        self._position = 0
        self._documents = self._read()

    def _count(self, shard: int) -> int:
        counts, split = self.cache.entries[shard].counts, self._settings["split"]
        if split is None:
            return counts.documents
        return counts.held_out_documents if split == "held_out" else counts.documents - counts.held_out_documents

    def __len__(self) -> int:
        """Documents of this reader in the whole epoch."""
        return self._stop - self._first

    def __next__(self) -> Document:
        document = next(self._documents)
        self._position += 1
        return document

    def _read(self) -> Iterator[Document]:
        start = self._first + self._position
        parts: list[tuple[int, slice]] = []
        for number, first in enumerate(self._starts[:-1]):
            low, high = max(start, first), min(self._stop, self._starts[number + 1])
            if low < high:
                parts.append((number, slice(low - first, high - first)))
        # A remote store is waited for; a local one is read faster without a second thread, for the two take turns.
        ahead = None if self.cache.place.local else ThreadPoolExecutor(1, thread_name_prefix="specauf-read")
        try:
            coming: Future[dict[int, Shard]] | None = None
            for turn, (number, part) in enumerate(parts):
                shards = self._load(number) if coming is None else coming.result()
                coming = ahead.submit(self._load, parts[turn + 1][0]) if ahead and turn + 1 < len(parts) else None
                yield from self._window(number, shards, part)
        finally:
            if ahead:
                ahead.shutdown(wait=False, cancel_futures=True)

    def _load(self, number: int) -> dict[int, Shard]:
        """The shards of a window that hold any of the wanted documents."""
        return {m: self.cache.shard(m, self.fields).prepare() for m in self._windows[number] if self._count(m)}

    def _window(self, number: int, shards: dict[int, Shard], part: slice) -> Iterator[Document]:
        split = self._settings["split"]
        places = [
            (m, local)
            for m, shard in shards.items()
            for local in range(len(shard))
            if split is None or shard.arrays["held_out"][local] == (split == "held_out")
        ]
        order = np.arange(len(places))
        if self._settings["shuffle"]:
            order = np.random.default_rng((*self._seed, number)).permutation(order)
        for place in order[part]:
            shard, local = places[place]
            yield shards[shard].document(local)

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it is a position in."""
        return {**self._settings, "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved position.

        Raises:
            UserError: it was saved in another cache, order or split over readers.
        """
        for name, value in self._settings.items():
            if state[name] != value:
                raise UserError(
                    f"saved reading position: {name} is {state[name]!r}, now {value!r}: resume with the same settings"
                )
        self._position = int(state["position"])
        self._documents = self._read()
