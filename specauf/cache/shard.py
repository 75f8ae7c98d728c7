"""One shard: read whole, checked against its digests, decoded once, cut into documents."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float32, Int64

from specauf.cache import logprobs
from specauf.cache.arrays import decode_object, read_array
from specauf.cache.features import FeatureCodec, decode_sketch
from specauf.cache.location import Location
from specauf.cache.objects import field_of, read_arrays
from specauf.cache.schema import CommitRecord

TOKEN_FIELDS = ("tokens", "loss_mask", "doc_offsets", "held_out", "row_index")
TOPK_FIELDS = ("topk_ids", "id_table", "topk_logprobs", "head_mass")
FEATURE_FIELDS = ("features", "sketch", "feature_scale")


@dataclass(slots=True, eq=False)  # not frozen: made four times as fast, and one is made for every document read
class Document:
    """One document of a cache, decoded.

    Attributes:
        index: its number in the cache.
        tokens: token ids.
        loss_mask: True where the token is supervised.
        row_index: positions t that have a top-k row; row t describes the token at t+1.
        topk_ids: token ids of each row, most probable first; -1 where a row keeps fewer than k. None when not read.
        topk_logprobs: their absolute log-probabilities (nats); -inf where a row keeps fewer than k.
        head_mass: probability the entries of a row hold together.
        held_out: the document belongs to the validation split.
    """

    index: int
    tokens: Int64[np.ndarray, " tokens"]
    loss_mask: Bool[np.ndarray, " tokens"]
    row_index: Int64[np.ndarray, " rows"]
    topk_ids: Int64[np.ndarray, "rows k"] | None
    topk_logprobs: Float32[np.ndarray, "rows k"] | None
    head_mass: Float32[np.ndarray, " rows"] | None
    held_out: bool
    _codec: FeatureCodec
    _codes: np.ndarray | None
    _scale: np.ndarray | None

    @property
    def features(self) -> Float32[np.ndarray, "tokens features"] | None:
        """Taps of every token, concatenated; of a sketch its reconstruction. None when not stored or not read."""
        return None if self._codes is None else self._codec.decode(self._codes, self._scale)

    @property
    def sketch(self) -> Float32[np.ndarray, "tokens rank"] | None:
        """Sketch coordinates y of every token; None without a sketch."""
        if self._codes is None or self._codec.kind != "sketch":
            return None
        assert self._scale is not None
        return decode_sketch(self._codes, self._scale)

    @property
    def training_features(self) -> Float32[np.ndarray, "tokens width"] | None:
        """What the drafter's `fc` reads: the sketch where there is one, else the features."""
        return self.sketch if self._codec.kind == "sketch" else self.features


@dataclass(frozen=True)
class Shard:
    """A shard's arrays as stored, with what is needed to cut documents from them.

    Attributes:
        first: cache number of the first document.
        arrays: by field name, as stored; only the fields that were asked for.
        codec: how features are stored.
    """

    first: int
    arrays: dict[str, np.ndarray]
    codec: FeatureCodec

    def __len__(self) -> int:
        return len(self.arrays["held_out"])

    @cached_property
    def _cuts(self) -> list[tuple[int, int, int, int]]:
        """First token and row of each document, and those behind its last; Python's numbers cut arrays fastest."""
        starts = self.arrays["doc_offsets"]
        rows = np.searchsorted(self.arrays["row_index"], starts)
        return list(zip(*(cuts.tolist() for cuts in (starts[:-1], starts[1:], rows[:-1], rows[1:])), strict=True))

    @cached_property
    def _tokens(self) -> np.ndarray:
        return self.arrays["tokens"].astype(np.int64)

    @cached_property
    def _row_index(self) -> np.ndarray:
        """The position of each row in its own document."""
        rows = [last - first for _, _, first, last in self._cuts]
        return self.arrays["row_index"] - np.repeat(self.arrays["doc_offsets"][:-1], rows)

    @cached_property
    def _topk(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
        """Log-probs and mass of the whole shard, for many small documents decode slower one by one.

        And the table of ids, and whether any row has fewer than k entries; what it lacks is missing at its end.
        """
        mass = logprobs.decode_head_mass(self.arrays["head_mass"])
        values = logprobs.decode_logprobs(self.arrays["topk_logprobs"], mass)
        return values, mass, self.arrays["id_table"].astype(np.int64), bool(np.isneginf(values[:, -1]).any())

    def _rows(self, rows: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids, log-probs and mass of some rows."""
        values, mass, table, cut = self._topk
        ids = logprobs.decode_ids(self.arrays["topk_ids"][rows], table)
        if cut:
            ids[np.isneginf(values[rows])] = -1
        return ids, values[rows], mass[rows]

    def prepare(self) -> "Shard":
        """Decode now what the first document would wait for."""
        if "topk_ids" in self.arrays:
            _ = self._topk
        return self

    def document(self, local: int) -> Document:
        """Document number `local` of the shard."""
        a = self.arrays
        start, stop, first_row, last_row = self._cuts[local]
        rows = slice(first_row, last_row)
        ids, values, mass = self._rows(rows) if "topk_ids" in a else (None, None, None)
        codes = a.get("features", a.get("sketch"))
        scale = a.get("feature_scale")
        return Document(
            index=self.first + local,
            tokens=self._tokens[start:stop],
            loss_mask=a["loss_mask"][start:stop],
            row_index=self._row_index[rows],
            topk_ids=ids,
            topk_logprobs=values,
            head_mass=mass,
            held_out=bool(a["held_out"][local]),
            _codec=self.codec,
            _codes=None if codes is None else codes[start:stop],
            _scale=None if scale is None else scale[start:stop],
        )

    def documents(self) -> Iterator[Document]:
        """All documents in order."""
        return map(self.document, range(len(self)))


def load_shard(
    place: Location,
    record: CommitRecord,
    first: int,
    codec: FeatureCodec,
    fields: Collection[str] | None = None,
    problems: list[str] | None = None,
) -> Shard | None:
    """Read a shard whole, every object checked against its commit record first.

    Args:
        place: the shard's directory.
        record: its commit record.
        first: cache number of its first document.
        codec: how features are stored.
        fields: fields to read, of those the record has; None for all.
        problems: where to note what is wrong, by sha256; None compares CRC-32C and raises at the first.

    Returns:
        The shard; None when there were problems.

    Raises:
        UserError: an object is missing, truncated or damaged; the message names shard and field.
    """
    stored = {name.split("/", 1)[0] for name in record.objects if name.endswith("/zarr.json")}
    fields = sorted(stored if fields is None else stored.intersection(fields))
    whole = [n for n in record.objects if field_of(n) in fields or field_of(n) == "group"]
    objects = read_arrays(place, record, whole, problems)
    if problems:
        return None
    arrays = {name: _decode(name, objects) for name in fields}
    others = [name for name, array in arrays.items() if array is None]
    if others:
        with place.as_local(objects) as folder:
            arrays |= {name: read_array(folder, name) for name in others}
    return Shard(first, {name: array for name, array in arrays.items() if array is not None}, codec)


def _decode(name: str, objects: Mapping[str, bytes | memoryview]) -> np.ndarray | None:
    """A field from its checked bytes; None when it takes Zarr to read it."""
    chunks = [n for n in objects if n.startswith(f"{name}/c")]
    return decode_object(objects[f"{name}/zarr.json"], objects[chunks[0]]) if len(chunks) == 1 else None
