"""Writing a cache: the identity first, the target's files, shard after shard, the manifest last.

Nothing here knows of Lightning, ranks or progress bars, so any driver can call it. A shard counts once its commit
record is there, and that is written after the shard's data; what a killed writer left is overwritten.
"""

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import zarr
from safetensors.numpy import save as save_numpy
from safetensors.torch import save as save_torch
from torch import Tensor
from zarr.codecs import BloscCodec
from zarr.storage import MemoryStore

from cache_builder.document import BuiltDocument
from cache_builder.features import encode_features
from specauf.cache import logprobs
from specauf.cache.features import FeatureCodec
from specauf.cache.integrity import content_problems, count
from specauf.cache.location import Location, sha256
from specauf.cache.reader import FEATURE_FIT, IDENTITY, LOCK, MANIFEST, NOTES, TARGET
from specauf.cache.schema import (
    FORMAT_VERSION,
    CommitRecord,
    Counts,
    FieldInfo,
    Identity,
    Manifest,
    ObjectEntry,
    ShardEntry,
    from_json,
    open_sealed,
    seal,
    to_json,
)
from specauf.cache.target import CONFIG, TOKENIZER, WEIGHTS
from specauf.errors import UserError

CHUNK_BYTES = 1 << 20  # decoded, so that several threads share a shard's work
BLOCK_BYTES = 1 << 18  # Blosc's own choice is 16 times smaller: 5 % more bytes, 1.5 times slower to decode


@runtime_checkable
class Tokenizer(Protocol):
    """A tokenizer that can save its files, as every Hugging Face tokenizer can."""

    def save_pretrained(self, save_directory: str) -> Any:
        """Write the tokenizer's files to a directory."""


@dataclass(frozen=True)
class StorageSpec:
    """All that `write_shard` needs besides documents.

    Attributes:
        identity: of the cache.
        codec: how features are stored.
    """

    identity: Identity
    codec: FeatureCodec


def shard_name(number: int) -> str:
    """`shard-00007` for 7."""
    return f"shard-{number:05d}"


def begin(cache_dir: str, identity: Identity) -> None:
    """Mark a directory as this cache's, or check that it is: the first thing a build does.

    Raises:
        UserError: the directory is a file, or holds a cache of another identity; names the field and both values.
    """
    place = Location(cache_dir)
    if place.is_file():
        raise UserError(f"{cache_dir} is a file, expected a directory for the cache: give another --out")
    names = [n for n in place.files() if n not in (LOCK, "build.json")] if place.exists() else []
    if MANIFEST in names:
        found = open_sealed(place.read(MANIFEST), f"{cache_dir}/{MANIFEST}").identity
    elif IDENTITY in names:
        found = from_json(Identity, place.read(IDENTITY), f"{cache_dir}/{IDENTITY}")
    elif names:
        raise UserError(f"{cache_dir} holds {names[0]!r} and no cache: give another --out")
    else:
        found = identity
    for name in Identity.__dataclass_fields__:
        old, new = getattr(found, name), getattr(identity, name)
        if old != new:
            raise UserError(
                f"{cache_dir} holds a cache whose {name} is {old!r}, this build has {new!r}: "
                "give another --out, or delete that directory"
            )
    if IDENTITY not in names:
        place.write(IDENTITY, to_json(identity))


def write_target(
    cache_dir: str,
    identity: Identity,
    *,
    config: Mapping[str, Any],
    embed_tokens: Tensor,
    lm_head: Tensor | None,
    tokenizer: Tokenizer,
    codec: FeatureCodec,
) -> CommitRecord:
    """Store what training needs of the target, then its commit record.

    Args:
        cache_dir: the cache.
        identity: of the cache.
        config: the target's config.json.
        embed_tokens: [vocabulary, hidden].
        lm_head: the same shape; None when it is the embedding.
        tokenizer: saved with its chat template.
        codec: fitted; its scales and basis are stored.
    """
    weights = {"embed_tokens": embed_tokens} if lm_head is None else {"embed_tokens": embed_tokens, "lm_head": lm_head}
    files = {
        WEIGHTS: save_torch({name: w.detach().cpu().contiguous() for name, w in weights.items()}),
        CONFIG: _json(config),
    }
    fit = {"channel_scale": codec.channel_scale, "basis": codec.basis}
    if codec.channel_scale is not None:
        files[FEATURE_FIT] = save_numpy({n: np.ascontiguousarray(a) for n, a in fit.items() if a is not None})
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
            files[f"{TOKENIZER}/{path.relative_to(folder).as_posix()}"] = path.read_bytes()
    return _commit(Location(cache_dir), TARGET, TARGET, files, identity, Counts(), {})


def write_shard(
    cache_dir: str,
    number: int,
    documents: Sequence[BuiltDocument],
    spec: StorageSpec,
    drops: Mapping[str, int] | None = None,
) -> CommitRecord:
    """Store documents as one shard, then its commit record; what was there before is replaced.

    The same documents give the same bytes, whoever writes them.

    Args:
        cache_dir: the cache.
        number: of the shard.
        documents: at least one.
        spec: identity and feature codec.
        drops: documents left out while this shard was made, by reason.

    Raises:
        UserError: a document breaks a rule of the format, or the disk is full.
    """
    arrays, attributes = _arrays(documents, spec)
    for field, what in content_problems(arrays, spec.identity):
        raise UserError(f"{shard_name(number)}: field {field}: {what}: check the target and its tokenizer")
    top1 = np.concatenate([d.topk_ids[:, 0] == d.tokens[d.row_index + 1] for d in documents])
    mass = logprobs.decode_head_mass(arrays["head_mass"])
    counts = count(arrays) + Counts(head_mass_sum=float(mass.sum(dtype=np.float64)), argmax_is_data_sum=int(top1.sum()))
    objects = _encode_group(arrays, attributes)
    name = shard_name(number)
    return _commit(Location(cache_dir), name, f"{name}.zarr", objects, spec.identity, counts, dict(drops or {}))


def committed_shards(cache_dir: str, identity: Identity) -> dict[int, CommitRecord]:
    """Commit records of the shards that are whole, by shard number.

    Raises:
        UserError: a record belongs to another identity or cannot be read.
    """
    place, records = Location(cache_dir), {}
    for file in place.files():
        match = re.fullmatch(r"(shard-(\d{5,}))\.json", file)
        if match is None:
            continue
        record = from_json(CommitRecord, place.read(file), f"{cache_dir}/{file}")
        if record.identity != identity.digest or record.name != match[1]:
            raise UserError(f"{cache_dir}/{file} belongs to another cache: delete it, or give another --out")
        records[int(match[2])] = record
    return dict(sorted(records.items()))


def write_manifest(cache_dir: str, identity: Identity, drops: Mapping[str, int] | None = None) -> Manifest:
    """Finish a cache: sum up its commit records into the manifest.

    Args:
        cache_dir: the cache, with shards 0 to n-1 committed.
        identity: of the cache.
        drops: documents left out before any shard was made, by reason.

    Raises:
        UserError: there is no shard, or one in between is missing.
    """
    place, records = Location(cache_dir), committed_shards(cache_dir, identity)
    if not records:
        raise UserError(f"{cache_dir}: no document is left to store: see the counts of dropped documents")
    missing = sorted(set(range(max(records) + 1)) - records.keys())
    if missing:
        raise UserError(f"{cache_dir}: {shard_name(missing[0])} is missing: run the same build again")
    counts, total = Counts(), dict(drops or {})
    fields: dict[str, FieldInfo] = {}
    entries = []
    for record in records.values():
        counts = counts + record.counts
        for reason, dropped in record.drops.items():
            total[reason] = total.get(reason, 0) + dropped
        stored = sum(o.bytes for o in record.objects.values())
        entries.append(ShardEntry(record.name, record.counts, stored, sha256(to_json(record))))
        _add_fields(fields, place, record)
    target = sha256(place.read(f"{TARGET}.json"))
    notes = {name: ObjectEntry(len(data), sha256(data)) for name, data in place.read_all(list(NOTES)).items()}
    manifest = Manifest(FORMAT_VERSION, identity, counts, total, fields, tuple(entries), target, notes)
    place.write(MANIFEST, seal(manifest))
    return manifest


def _arrays(
    documents: Sequence[BuiltDocument], spec: StorageSpec
) -> tuple[dict[str, np.ndarray], dict[str, dict[str, Any]]]:
    """A shard's arrays as stored, and each field's attributes."""
    lengths = np.array([len(d.tokens) for d in documents])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = np.concatenate([d.topk_ids for d in documents])
    values = np.concatenate([d.topk_logprobs for d in documents]).astype(np.float64)
    if np.isnan(values).any() or np.isposinf(values).any():
        raise UserError("the target's log-probabilities hold NaN or Inf: compute in float32, or check the weights")
    ids = np.where(np.isneginf(values), ids[:, :1], ids)
    vocab_size = spec.identity.vocab_size
    tokens = np.concatenate([d.tokens for d in documents])
    for name, array in (("tokens", tokens), ("topk_ids", ids)):
        if array.size and (array.min() < 0 or array.max() >= vocab_size):
            raise UserError(
                f"{name} hold ids from {array.min()} to {array.max()}, the vocabulary has {vocab_size}: "
                "the tokenizer does not belong to this target"
            )
    ranks, table = logprobs.encode_ids(ids, vocab_size)
    arrays = {
        "tokens": tokens.astype(logprobs.smallest_uint(vocab_size - 1)),
        "loss_mask": np.concatenate([d.loss_mask for d in documents]),
        "doc_offsets": offsets,
        "held_out": np.array([d.held_out for d in documents]),
        "row_index": np.concatenate([d.row_index + o for d, o in zip(documents, offsets[:-1], strict=True)]),
        "topk_ids": ranks,
        "id_table": table,
        "topk_logprobs": logprobs.encode_logprobs(values),
        "head_mass": logprobs.encode_head_mass(np.exp(values).sum(1)),
    }
    attributes: dict[str, dict[str, Any]] = {
        "topk_ids": {"encoding": "rank in id_table"},
        "topk_logprobs": {
            "encoding": "difference along k of codes; sqrt(p) in steps, then log p in steps",
            "sqrt_steps": logprobs.SQRT_STEPS,
            "knee_code": logprobs.KNEE_CODE,
            "log_step": logprobs.LOG_STEP,
            "no_entry": logprobs.NO_ENTRY,
        },
        "head_mass": {
            "encoding": "log(mass / (1 - mass)) in steps",
            "step": logprobs.MASS_STEP,
            "no_tail": logprobs.NO_TAIL,
        },
    }
    if spec.codec.kind != "none":
        parts = [d.features for d in documents if d.features is not None]
        if len(parts) != len(documents):
            raise UserError(f"features are {spec.codec.kind}, but {len(documents) - len(parts)} documents have none")
        encoded = [encode_features(p, spec.codec) for p in parts]
        for name in encoded[0]:
            arrays[name] = np.concatenate([e[name] for e in encoded])
            attributes[name] = {"encoding": spec.codec.kind, "taps": list(spec.identity.taps)}
    return arrays, attributes


def _encode_group(arrays: Mapping[str, np.ndarray], attributes: Mapping[str, Mapping[str, Any]]) -> dict[str, bytes]:
    """A Zarr v3 group's objects by name; each array is one sharded object."""
    store = MemoryStore({})
    group = zarr.create_group(store, zarr_format=3)
    for name, array in arrays.items():
        rows = max(1, CHUNK_BYTES // max(1, array.dtype.itemsize * int(np.prod(array.shape[1:]))))
        rows = min(rows, max(1, len(array)))
        whole = -(-max(1, len(array)) // rows) * rows
        stored = group.create_array(
            name,
            shape=array.shape,
            chunks=(rows, *array.shape[1:]),
            shards=(whole, *array.shape[1:]),
            dtype=array.dtype,
            compressors=[_compressor(name, array)],
            fill_value=0,
            attributes=dict(attributes.get(name, {})),
            config={"write_empty_chunks": True},
        )
        if array.size:
            stored[...] = array
    return {name: value.to_bytes() for name, value in store._store_dict.items()}


def _compressor(name: str, array: np.ndarray) -> BloscCodec:
    """Fast Zstandard; LZ4 for bf16 features, whose mantissas do not shrink: reading them must be near copying them."""
    bf16 = name == "features" and array.dtype == np.uint16
    cname: Literal["lz4", "zstd"] = "lz4" if bf16 else "zstd"
    level = 5 if bf16 else 1
    return BloscCodec(
        cname=cname, clevel=level, shuffle="shuffle", typesize=array.dtype.itemsize, blocksize=BLOCK_BYTES
    )


def _commit(
    place: Location,
    name: str,
    folder: str,
    files: Mapping[str, bytes],
    identity: Identity,
    counts: Counts,
    drops: dict[str, int],
) -> CommitRecord:
    place.remove(f"{name}.json")
    place.remove(folder)
    for file, data in sorted(files.items()):
        place.write(f"{folder}/{file}", data)
    objects = {file: ObjectEntry(len(data), sha256(data)) for file, data in sorted(files.items())}
    record = CommitRecord(FORMAT_VERSION, name, identity.digest, counts, drops, objects)
    place.write(f"{name}.json", to_json(record))
    return record


def _add_fields(fields: dict[str, FieldInfo], place: Location, record: CommitRecord) -> None:
    """Add one shard's sizes to the table of fields; type and width come from the arrays' own metadata."""
    for file, entry in record.objects.items():
        name = file.split("/", 1)[0]
        if "/" not in file:
            continue
        old = fields.get(name, FieldInfo("uint8", 1, 0, 0))
        if file == f"{name}/zarr.json":
            meta = json.loads(place.read(f"{record.name}.zarr/{file}"))
            wider = max((old.dtype, meta["data_type"]), key=lambda t: np.dtype(t).itemsize)
            width = int(np.prod(meta["shape"][1:]))
            fields[name] = FieldInfo(wider, width, old.rows + meta["shape"][0], old.bytes + entry.bytes)
        else:
            fields[name] = FieldInfo(old.dtype, old.width, old.rows, old.bytes + entry.bytes)


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()
