"""The order of an epoch, its split over readers, and a position in it that can be saved."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from specauf.cache.shard import Document
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
        counts, split = self.cache.manifest.shards[shard].counts, self._settings["split"]
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
        for number, members in enumerate(self._windows):
            low, high = max(start, self._starts[number]), min(self._stop, self._starts[number + 1])
            if low < high:
                yield from self._window(number, members, slice(low - self._starts[number], high - self._starts[number]))

    def _window(self, number: int, members: list[int], part: slice) -> Iterator[Document]:
        split = self._settings["split"]
        shards = {m: self.cache.shard(m, self.fields) for m in members if self._count(m)}
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
