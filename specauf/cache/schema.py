"""What a cache's JSON files hold: the manifest, the commit records and the identity that ties them together."""

import dataclasses
import functools
import json
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from specauf.cache.location import sha256
from specauf.errors import UserError
from specauf.typed_json import short, typed

FORMAT_VERSION = 1
REMEDY = "run cache-builder verify --repair"
# Fields that version 1 got after its first caches were written.
_ADDED = frozenset({"crc32c"})
FeatureKind = Literal["none", "bf16", "int8", "sketch"]
Record = TypeVar("Record")


@dataclass(frozen=True)
class Identity:
    """What a cache was made from; two caches with equal identities hold the same numbers.

    Attributes:
        target: `id` and `revision`, or `fingerprint` of the weights.
        tokenizer_hash: sha256 over the tokenizer's files.
        chat_template_hash: sha256 of the chat template, empty when there is none.
        vocab_size: rows of the embedding matrix; every stored id is below it.
        hidden_size: width of one tap, H.
        num_target_layers: layers of the target; every tap is below it.
        taps: layer ids whose outputs are kept, in order; tap i is HF `hidden_states[i + 1]`.
        k: log-probabilities kept per row, at most.
        top_p: a row keeps the fewest entries that reach this mass, at most k; None keeps k always.
        mask_token_id: the token that fills a block's drafted slots.
        target_dtype: what the target computed in.
        features: how the taps are stored.
        sketch_rank: columns of the sketch's basis; 0 without a sketch.
        corpus: name, fingerprint and whatever else chose the documents.
        regeneration: how the target answered the prompts, empty when the corpus' own answers are kept. `greedy: true`
            makes a replay on the cache exact.
        code_version: version of the code that wrote the cache.
    """

    target: dict[str, str]
    tokenizer_hash: str
    chat_template_hash: str
    vocab_size: int
    hidden_size: int
    num_target_layers: int
    taps: tuple[int, ...]
    k: int
    top_p: float | None
    mask_token_id: int
    target_dtype: str
    features: FeatureKind
    sketch_rank: int
    corpus: dict[str, Any]
    regeneration: dict[str, Any]
    code_version: str

    @property
    def feature_width(self) -> int:
        """Values of one token's features, F = taps x hidden size."""
        return len(self.taps) * self.hidden_size

    @functools.cached_property
    def digest(self) -> str:
        """Digest that every commit record repeats, so that shards of different runs never mix."""
        return sha256(to_json(self))

    def require(self, where: str, **expected: object) -> None:
        """Check some fields against what is wanted.

        Args:
            where: the cache's place, for the message.
            expected: wanted values by field name.

        Raises:
            UserError: naming the first field that differs, with both values.
        """
        for name, wanted in expected.items():
            found = getattr(self, name)
            if found != wanted:
                raise UserError(
                    f"cache {where}: {name} is {short(found)}, expected {short(wanted)}: "
                    "use the cache of this target and corpus, or build one"
                )


@dataclass(frozen=True)
class ObjectEntry:
    """One stored object.

    Attributes:
        bytes: its size.
        sha256: its digest, which `verify` compares.
        crc32c: its CRC-32C, which reading compares because it costs a tenth of sha256; early caches have none.
    """

    bytes: int
    sha256: str
    crc32c: int | None = None


@dataclass(frozen=True)
class Counts:
    """How much a shard or a cache holds.

    Attributes:
        documents: all documents.
        held_out_documents: those of the validation split.
        tokens: all tokens.
        supervised_tokens: tokens with the loss mask set.
        rows: positions with top-k log-probabilities.
        head_mass_sum: sum over rows of the probability that the kept entries hold.
        argmax_is_data_sum: rows whose most probable token is the document's next token.
    """

    documents: int = 0
    held_out_documents: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    rows: int = 0
    head_mass_sum: float = 0.0
    argmax_is_data_sum: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)))

    @property
    def head_mass_mean(self) -> float:
        """Mean probability the kept entries hold."""
        return self.head_mass_sum / max(1, self.rows)

    @property
    def argmax_is_data(self) -> float:
        """Share of rows whose most probable token is the data's next token."""
        return self.argmax_is_data_sum / max(1, self.rows)


@dataclass(frozen=True)
class CommitRecord:
    """Written after a shard's (or the target's) data: it exists, so the data is whole.

    Attributes:
        format: version of the cache format.
        name: what is committed, `shard-00000` or `target`.
        identity: digest of the cache's identity.
        counts: of the shard.
        drops: documents left out while this shard was made, by reason.
        objects: every stored object by its name below the shard's directory.
    """

    format: int
    name: str
    identity: str
    counts: Counts
    drops: dict[str, int]
    objects: dict[str, ObjectEntry]


@dataclass(frozen=True)
class ShardEntry:
    """One shard in the manifest: its name, what it holds, and the digest of its commit record."""

    name: str
    counts: Counts
    bytes: int
    record: str


@dataclass(frozen=True)
class FieldInfo:
    """One field over all shards: what numbers are stored, how many for each row, and bytes on disk."""

    dtype: str
    width: int
    rows: int
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """The cache's table of contents, written last.

    Attributes:
        format: version of the cache format.
        identity: what the cache was made from.
        counts: over all shards.
        drops: documents left out, by reason.
        fields: sizes by field.
        shards: in order; document numbers run through them.
        target: digest of the target's commit record, `target.json`.
        notes: other files beside the shards, such as what the builder was told; no reader needs them.
        checksum: digest of the manifest's own bytes with this field empty.
    """

    format: int
    identity: Identity
    counts: Counts
    drops: dict[str, int]
    fields: dict[str, FieldInfo]
    shards: tuple[ShardEntry, ...] = field(default=())
    target: str = ""
    notes: dict[str, ObjectEntry] = field(default_factory=dict)
    checksum: str = ""

    @property
    def total_bytes(self) -> int:
        """Bytes of all shards' data; the target's weights, paid once, are not in it."""
        return sum(s.bytes for s in self.shards)


def to_json(record: Any) -> bytes:
    """A record's bytes: sorted keys, so that equal records have equal digests."""
    value = dataclasses.asdict(record, dict_factory=_without_absent)
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _without_absent(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Records written before a field existed keep their bytes, and so their digests."""
    return {name: value for name, value in pairs if value is not None or name not in _ADDED}


def seal(manifest: Manifest) -> bytes:
    """The manifest's bytes with its checksum filled in."""
    blank = to_json(dataclasses.replace(manifest, checksum=""))
    return to_json(dataclasses.replace(manifest, checksum=sha256(blank)))


def open_sealed(data: bytes, where: str) -> Manifest:
    """Read a manifest that `seal` wrote.

    Raises:
        UserError: as `from_json`, or its bytes do not match its checksum.
    """
    manifest = from_json(Manifest, data, where)
    if not is_sealed(data):
        raise UserError(f"{where}: field checksum: the manifest is damaged: {REMEDY}")
    return manifest


def is_sealed(data: bytes) -> bool:
    """Whether a manifest, of this format or another, is what its writer wrote."""
    try:
        checksum = json.loads(data)["checksum"]
        return bool(sha256(data.replace(checksum.encode(), b"", 1)) == checksum)
    except (ValueError, KeyError, TypeError, AttributeError):
        return False


def from_json(kind: type[Record], data: bytes, where: str) -> Record:
    """Read a record that `to_json` wrote.

    Raises:
        UserError: it is not JSON, is of a newer format, or lacks a field.
    """
    try:
        value = json.loads(data)
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error}): {REMEDY}") from error
    found = value.get("format", FORMAT_VERSION) if isinstance(value, dict) else FORMAT_VERSION
    if found != FORMAT_VERSION:
        raise UserError(
            f"{where}: format is {found!r}, this version reads {FORMAT_VERSION}: upgrade specauf or rebuild"
        )
    record: Record = typed(kind, value, where, REMEDY, _ADDED)
    return record
