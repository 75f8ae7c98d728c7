"""Writing a cache: the identity first, the target's files, shard after shard, the manifest last.

Nothing here knows of Lightning, ranks or progress bars, so any driver can call it. A shard counts once its commit
record is there, and that is written after the shard's data; what a killed writer left is overwritten.
"""

import json
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from safetensors.numpy import save as save_numpy
from safetensors.torch import save as save_torch
from torch import Tensor

from cache_builder.document import BuiltDocument
from cache_builder.encode import encode_group, field_attributes, shard_arrays
from specauf.cache import logprobs
from specauf.cache.features import FeatureCodec
from specauf.cache.integrity import content_problems, count
from specauf.cache.location import Location, StoreError, sha256
from specauf.cache.objects import entry_of
from specauf.cache.reader import FEATURE_FIT, IDENTITY, LOCK, MANIFEST, NOTES, TARGET
from specauf.cache.schema import (
    FORMAT_VERSION,
    CommitRecord,
    Counts,
    FieldInfo,
    Identity,
    Manifest,
    ShardEntry,
    from_json,
    open_sealed,
    seal,
    to_json,
)
from specauf.cache.target import CONFIG, TOKENIZER, WEIGHTS
from specauf.errors import UserError


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
        compress_features: also compress their arrays.
        device: where to work on features.
        confirm: called just before a shard is replaced; raises when the directory is no longer the caller's.
    """

    identity: Identity
    codec: FeatureCodec
    compress_features: bool = False
    device: torch.device | str = "cpu"
    confirm: Callable[[], object] = lambda: None


def shard_name(number: int) -> str:
    """`shard-00007` for 7."""
    return f"shard-{number:05d}"


def begin(cache_dir: str, identity: Identity, *, damaged_manifest: bool = False) -> None:
    """Mark a directory as this cache's, or check that it is: the first thing a build does.

    Args:
        cache_dir: the directory.
        identity: of the cache.
        damaged_manifest: there is one, and it cannot be read; the other files say whose the directory is.

    Raises:
        UserError: the directory is a file, or holds a cache of another identity, whose fields are named with both
            values, or nothing says what it holds.
    """
    place = Location(cache_dir)
    if place.is_file():
        raise UserError(f"{cache_dir} is a file, expected a directory for the cache: give another --out")
    unasked = {LOCK, "build.json"} | ({MANIFEST} if damaged_manifest else set())
    names = [n for n in place.files() if n not in unasked]
    if MANIFEST in names:
        found = open_sealed(place.read(MANIFEST), f"{cache_dir}/{MANIFEST}").identity
    elif IDENTITY in names:
        found = _begun_as(place)
    elif names:
        raise UserError(f"{cache_dir} holds {names[0]!r} and no cache: give another --out")
    else:
        found = identity
    differ = [
        f"{name} is {old!r}, this build has {new!r}"
        for name, (old, new) in fields_that_differ(asdict(found), asdict(identity)).items()
    ]
    if differ:
        raise UserError(
            f"{cache_dir} holds a cache whose {'; '.join(differ)}: give another --out, or delete that directory"
        )
    restore_identity(place, found)


def _begun_as(place: Location) -> Identity:
    try:
        return from_json(Identity, place.read(IDENTITY), IDENTITY)
    except StoreError:
        raise
    except UserError as error:
        raise UserError(
            f"{place.url}/{IDENTITY} is damaged, and no {MANIFEST} says what is in this directory: give another --out, "
            "or delete that directory"
        ) from error


def restore_identity(place: Location, identity: Identity) -> bool:
    """Write `identity.json` where it is missing or holds something else; whether that was so."""
    data = to_json(identity)
    if place.read_all([IDENTITY]).get(IDENTITY) == data:
        return False
    place.write(IDENTITY, data)
    return True


def fields_that_differ(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Fields with both values; of mappings only the entries that differ, by their dotted names."""
    found: dict[str, tuple[Any, Any]] = {}
    for name in sorted({*old, *new}, key=lambda name: (list(old).index(name) if name in old else len(old), name)):
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found |= {f"{name}.{key}": pair for key, pair in fields_that_differ(a, b).items()}
        elif a != b:
            found[name] = (a, b)
    return found


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
    files |= {f"{TOKENIZER}/{name}": data for name, data in tokenizer_files(tokenizer).items()}
    return write_target_files(cache_dir, identity, files, codec)


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """The files that a tokenizer saves, by name; the same whether the hub could be reached when it was loaded."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        paths = sorted(p for p in Path(folder).rglob("*") if p.is_file())
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    if "tokenizer_config.json" in files:
        # transformers writes down how it was told to load.
        config = files["tokenizer_config.json"]
        files["tokenizer_config.json"] = config.replace(b'"local_files_only": true', b'"local_files_only": false')
    return files


def write_target_files(
    cache_dir: str, identity: Identity, files: Mapping[str, bytes], codec: FeatureCodec
) -> CommitRecord:
    """Store the target's files and how features are stored, then their commit record.

    Args:
        cache_dir: the cache.
        identity: of the cache.
        files: by name; a feature fit among them is replaced.
        codec: fitted; its scales and basis are stored.
    """
    files = {name: data for name, data in files.items() if name != FEATURE_FIT}
    fit = _fit_bytes(codec)
    if fit is not None:
        files[FEATURE_FIT] = fit
    return _commit(Location(cache_dir), TARGET, TARGET, files, identity, Counts(), {})


def fit_digest(codec: FeatureCodec) -> str | None:
    """Digest of the stored scales and basis; None for features that have none."""
    fit = _fit_bytes(codec)
    return None if fit is None else sha256(fit)


def _fit_bytes(codec: FeatureCodec) -> bytes | None:
    if codec.channel_scale is None:
        return None
    arrays = {"channel_scale": codec.channel_scale, "basis": codec.basis}
    return save_numpy({name: np.ascontiguousarray(a) for name, a in arrays.items() if a is not None})


def write_shard(
    cache_dir: str,
    number: int,
    documents: Sequence[BuiltDocument],
    spec: StorageSpec,
    drops: Mapping[str, int] | None = None,
) -> CommitRecord:
    """Store documents as one shard, then its commit record; what was there before is replaced.

    The same documents give the same bytes, whoever writes them. A shard of none, for all were left out, has no arrays.

    Args:
        cache_dir: the cache.
        number: of the shard.
        documents: in the order of the corpus.
        spec: identity and feature codec.
        drops: documents left out while this shard was made, by reason.

    Raises:
        UserError: a document breaks a rule of the format, or the disk is full.
    """
    if not documents:
        name = shard_name(number)
        spec.confirm()
        return _commit(Location(cache_dir), name, f"{name}.zarr", {}, spec.identity, Counts(), dict(drops or {}))
    arrays = shard_arrays(documents, spec.identity, spec.codec, spec.device)
    top1 = np.concatenate([d.topk_ids[:, 0] == d.tokens[d.row_index + 1] for d in documents])
    return write_arrays(cache_dir, number, arrays, spec, int(top1.sum()), drops)


def write_arrays(
    cache_dir: str,
    number: int,
    arrays: dict[str, np.ndarray],
    spec: StorageSpec,
    argmax_is_data: int,
    drops: Mapping[str, int] | None = None,
) -> CommitRecord:
    """`write_shard` for arrays as they are stored.

    Args:
        cache_dir: the cache.
        number: of the shard.
        arrays: by field name.
        spec: identity and feature codec.
        argmax_is_data: rows whose most probable token is the data's.
        drops: documents left out while this shard was made, by reason.

    Raises:
        UserError: an array breaks a rule of the format, or the disk is full.
    """
    for field, what in content_problems(arrays, spec.identity):
        raise UserError(f"{shard_name(number)}: field {field}: {what}: check the target and its tokenizer")
    mass = logprobs.decode_head_mass(arrays["head_mass"])
    counts = count(arrays) + Counts(head_mass_sum=float(mass.sum(dtype=np.float64)), argmax_is_data_sum=argmax_is_data)
    attributes = field_attributes(arrays, spec.identity)
    objects = encode_group(arrays, attributes, compress_features=spec.compress_features)
    name = shard_name(number)
    spec.confirm()
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


def write_manifest(cache_dir: str, identity: Identity, shards: int, drops: Mapping[str, int] | None = None) -> Manifest:
    """Finish a cache: sum up its commit records into the manifest.

    Args:
        cache_dir: the cache, with all shards committed.
        identity: of the cache.
        shards: how many there are.
        drops: documents left out before any shard was made, by reason.

    Raises:
        UserError: a shard is missing, or none holds a document.
    """
    place, records = Location(cache_dir), committed_shards(cache_dir, identity)
    missing = sorted(set(range(shards)) - records.keys())
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
    if not counts.documents:
        said = ", ".join(f"{n} {reason}" for reason, n in sorted(total.items()))
        raise UserError(f"{cache_dir}: no document is left to store ({said}): relax what drops them")
    target = sha256(place.read(f"{TARGET}.json"))
    notes = {name: entry_of(data) for name, data in place.read_all(list(NOTES)).items()}
    manifest = Manifest(FORMAT_VERSION, identity, counts, total, fields, tuple(entries), target, notes)
    place.write(MANIFEST, seal(manifest))
    return manifest


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
    objects = {file: entry_of(data) for file, data in sorted(files.items())}
    record = CommitRecord(FORMAT_VERSION, name, identity.digest, counts, drops, objects)
    place.write(f"{name}.json", to_json(record))
    return record


def _add_fields(fields: dict[str, FieldInfo], place: Location, record: CommitRecord) -> None:
    """Add one shard's sizes to the table of fields; type and width come from the arrays' own metadata."""
    for file, entry in record.objects.items():
        name = file.split("/", 1)[0]
        if "/" not in file:
            continue
        old = fields.get(name, FieldInfo("", 1, 0, 0))
        if file == f"{name}/zarr.json":
            meta = json.loads(place.read(f"{record.name}.zarr/{file}"))
            wider = max((t for t in (old.dtype, meta["data_type"]) if t), key=lambda t: np.dtype(t).itemsize)
            width = int(np.prod(meta["shape"][1:]))
            fields[name] = FieldInfo(wider, width, old.rows + meta["shape"][0], old.bytes + entry.bytes)
        else:
            fields[name] = FieldInfo(old.dtype, old.width, old.rows, old.bytes + entry.bytes)


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()
