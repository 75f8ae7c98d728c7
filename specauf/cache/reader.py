"""Opening a cache and reading its documents, in order or shuffled, whole shards at a time."""

import functools
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Bool, Int64
from safetensors.numpy import load

from specauf.cache.features import FeatureCodec
from specauf.cache.location import Location, is_safe_name, sha256
from specauf.cache.objects import check_listing, read_checked
from specauf.cache.order import Epoch
from specauf.cache.schema import CommitRecord, Identity, ShardEntry, from_json, open_sealed
from specauf.cache.shard import FEATURE_FIELDS, TOKEN_FIELDS, TOPK_FIELDS, Document, Shard, load_shard
from specauf.errors import UserError

if TYPE_CHECKING:
    import specauf.cache.target

Split = Literal["train", "held_out"]
MANIFEST, TARGET, FEATURE_FIT = "manifest.json", "target", "features.safetensors"
LOCK, IDENTITY, NOTES = "builder.lock", "identity.json", ("identity.json", "build.json")
_KNOWN_RECORDS = 4096  # some kilobytes each
_ASKED_AT_ONCE = 16  # shards of a remote store; their masks are small
_MASKS = ("loss_mask", "doc_offsets", "held_out")


def open_cache(url: str) -> "Cache":
    """Open a finished cache.

    Args:
        url: its directory, or any fsspec URL.

    Raises:
        UserError: there is no cache, it is unfinished, of a newer format, or its manifest is damaged.
    """
    return Cache(str(url))


class Cache:
    """A finished cache, open for reading.

    Safe to hand to DataLoader workers, forked or spawned. Holds at most the decoded shards that the caller asks for.

    Args:
        url: its directory, or any fsspec URL.

    Attributes:
        manifest: identity, counts and shards.
        fingerprint: digest of the manifest, and through it of every stored byte.
        entries: shards that hold documents; one whose documents were all left out is in the manifest only.
    """

    def __init__(self, url: str) -> None:
        self.url, self.place = url, Location(url)
        try:
            data = self.place.read(MANIFEST)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise UserError(_no_manifest(self.place)) from error
        self.fingerprint = sha256(data)
        self.manifest = open_sealed(data, f"{url}/{MANIFEST}")
        for name in [s.name for s in self.manifest.shards] + list(self.manifest.notes):
            if not is_safe_name(name) or "/" in name:
                raise UserError(f"{url}/{MANIFEST}: name {name!r} leaves the cache: do not use this cache")
        self.entries = tuple(s for s in self.manifest.shards if s.counts.documents)
        documents = [s.counts.documents for s in self.entries]
        self.first_documents = np.concatenate([[0], np.cumsum(documents)]).astype(np.int64)
        self._known: dict[int, CommitRecord] = {}
        self._shards: OrderedDict[tuple[int, tuple[str, ...]], Shard] = OrderedDict()

    def __reduce__(self) -> tuple[type["Cache"], tuple[str]]:
        return Cache, (self.url,)

    def __len__(self) -> int:
        return self.manifest.counts.documents

    @property
    def num_shards(self) -> int:
        """How many shards hold documents."""
        return len(self.entries)

    def record(self, entry: ShardEntry) -> CommitRecord:
        """A shard's commit record, checked against the manifest.

        Raises:
            UserError: it is missing, damaged, or names an object outside the shard.
        """
        return self._record(f"{entry.name}.json", entry.name, entry.record)

    @cached_property
    def target_record(self) -> CommitRecord:
        """Commit record of the target's files."""
        return self._record(f"{TARGET}.json", TARGET, self.manifest.target)

    def _record(self, file: str, name: str, digest: str) -> CommitRecord:
        where = f"cache {self.url}: {name}: commit record {file}"
        try:
            data = self.place.read(file)
        except FileNotFoundError as error:
            raise UserError(f"{where} is missing: run cache-builder verify --repair") from error
        if sha256(data) != digest:
            raise UserError(
                f"{where} is damaged: its sha256 differs from the manifest: run cache-builder verify --repair"
            )
        record = from_json(CommitRecord, data, where)
        for found, expected in ((record.name, name), (record.identity, self.manifest.identity.digest)):
            if found != expected:
                raise UserError(
                    f"{where} belongs to {found!r}, expected {expected!r}: run cache-builder verify --repair"
                )
        for unsafe in (n for n in record.objects if not is_safe_name(n)):
            raise UserError(f"{where}: object name {unsafe!r} leaves the shard: do not use this cache")
        return record

    @cached_property
    def codec(self) -> FeatureCodec:
        """How this cache stores features."""
        return stored_codec(self.place, self.manifest.identity, lambda: self.target_record)

    @cached_property
    def target(self) -> "specauf.cache.target.TargetFiles":
        """The target's embedding, LM head, config and tokenizer."""
        from specauf.cache.target import TargetFiles

        return TargetFiles(self.place.child(TARGET), self.target_record, self.codec)

    def shard(self, number: int, fields: Collection[str] | None = None) -> Shard:
        """Read one shard whole; see `load_shard`. Its record and list of objects are read the first time only."""
        entry = self.entries[number]
        place, first = self.place.child(f"{entry.name}.zarr"), int(self.first_documents[number])
        record = self._known.get(number)
        if record is None:
            record = self.record(entry)
            check_listing(place, record)
            if len(self._known) < _KNOWN_RECORDS:
                self._known[number] = record
        shard = load_shard(place, record, first, self.codec, fields)
        assert shard is not None
        return shard

    def document(self, number: int, *, topk: bool = True, features: bool = True, shards_in_memory: int = 1) -> Document:
        """One document by its number in the cache.

        Args:
            number: 0 to len - 1.
            topk: also read the log-probabilities.
            features: also read the features.
            shards_in_memory: shards kept decoded, the least recently used ones leave.

        Raises:
            IndexError: there is no such document.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"document {number} of a cache of {len(self)}")
        shard = int(np.searchsorted(self.first_documents, number, side="right")) - 1
        key = (shard, fields_to_read(topk=topk, features=features))
        if key not in self._shards:
            while len(self._shards) >= shards_in_memory:
                self._shards.popitem(last=False)
            self._shards[key] = self.shard(*key)
        self._shards.move_to_end(key)
        return self._shards[key].document(number - int(self.first_documents[shard]))

    def documents(
        self,
        shuffle: bool = False,
        seed: int = 0,
        epoch: int = 0,
        split: Split | None = None,
        rank: int = 0,
        world: int = 1,
        *,
        topk: bool = True,
        features: bool = True,
        window: int = 1,
    ) -> Epoch:
        """One epoch's documents, or the part of them that reader `rank` of `world` reads.

        Args:
            shuffle: shards, and documents within a window of shards, in an order drawn from (seed, epoch).
            seed: of the order.
            epoch: of the order.
            split: `train`, `held_out` or None for both.
            rank: which part; with DataLoader workers, rank x workers + worker.
            world: number of parts; they differ by at most one document.
            topk: also read the log-probabilities.
            features: also read the features.
            window: shards mixed at once and in memory. Of a remote store twice as many, the next are read meanwhile.

        Returns:
            An iterator of documents whose `state_dict()` and `load_state_dict()` keep its position.
        """
        return Epoch(
            self,
            shuffle=shuffle,
            seed=seed,
            epoch=epoch,
            split=split,
            rank=rank,
            world=world,
            fields=fields_to_read(topk=topk, features=features),
            window=window,
        )

    def loss_masks(self, split: Split | None = None) -> Iterator[list[tuple[int, Bool[np.ndarray, " tokens"]]]]:
        """Number and loss mask of each document, shard by shard, without reading anything else."""
        for shard in self._all(_MASKS):
            a = shard.arrays
            yield [
                (shard.first + local, a["loss_mask"][a["doc_offsets"][local] : a["doc_offsets"][local + 1]])
                for local, held_out in enumerate(a["held_out"])
                if split is None or held_out == (split == "held_out")
            ]

    def supervised_token_counts(self) -> Int64[np.ndarray, " vocabulary"]:
        """How often each token is supervised in the training split."""
        counts = np.zeros(self.manifest.identity.vocab_size, np.int64)
        for shard in self._all(("tokens", *_MASKS)):
            a = shard.arrays
            train = np.repeat(~a["held_out"], np.diff(a["doc_offsets"]))
            counts += np.bincount(a["tokens"][a["loss_mask"] & train], minlength=len(counts))
        return counts

    def _all(self, fields: Collection[str]) -> Iterator[Shard]:
        """Every shard in order. A remote store is asked for several at once, for each answer takes a while."""
        if self.place.local is not None:
            yield from (self.shard(number, fields) for number in range(self.num_shards))
            return
        pool = ThreadPoolExecutor(_ASKED_AT_ONCE, thread_name_prefix="specauf-read")
        try:
            coming: deque[Future[Shard]] = deque()
            for number in range(self.num_shards):
                coming.append(pool.submit(self.shard, number, fields))
                if len(coming) == _ASKED_AT_ONCE:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def stored_codec(place: Location, identity: Identity, record: Callable[[], CommitRecord]) -> FeatureCodec:
    """How a cache stores features, by the fit among its target's files where there is one.

    Args:
        place: the cache.
        identity: of the cache.
        record: gives the target's commit record; not called where nothing is fitted.

    Raises:
        UserError: the fit is missing or damaged.
    """
    kind, taps = identity.features, len(identity.taps)
    if kind in ("none", "bf16"):
        return FeatureCodec(kind, taps)
    arrays = load(read_checked(place.child(TARGET), record(), [FEATURE_FIT])[FEATURE_FIT])
    return FeatureCodec(kind, taps, arrays["channel_scale"], arrays.get("basis"))


@functools.cache
def fields_to_read(*, topk: bool, features: bool) -> tuple[str, ...]:
    """The fields of a shard that a reader needs."""
    return TOKEN_FIELDS + (TOPK_FIELDS if topk else ()) + (FEATURE_FIELDS if features else ())


def _no_manifest(place: Location) -> str:
    if place.is_file():
        return f"{place.url} is a file, expected a cache's directory: give the directory that cache-builder build wrote"
    if not place.exists():
        return f"{place.url} does not exist: build it with cache-builder build --out {place.url}"
    if any(name.startswith("shard-") for name in place.files()):
        return f"{place.url} is an unfinished cache (no {MANIFEST}): run the same cache-builder build or shrink again"
    return f"{place.url} holds no {MANIFEST}: give the directory that cache-builder build wrote"
