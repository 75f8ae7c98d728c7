"""Writing a cache: the identity first, the target's files, shard after shard, the manifest last.

Nothing here knows of Lightning, ranks or progress bars, so any driver can call it. A shard counts once its commit
record is there, and that is written after the shard's data; what a killed writer left is overwritten.
"""

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from safetensors.numpy import save as save_numpy
from safetensors.torch import save as save_torch
from torch import Tensor

from cache_builder.beginning import begin
from cache_builder.document import BuiltDocument
from cache_builder.encode import encode_group, field_attributes, shard_arrays
from cache_builder.manifest import committed_shards, shard_name, write_manifest
from specauf.cache import logprobs
from specauf.cache.features import FeatureCodec
from specauf.cache.integrity import content_problems, count
from specauf.cache.location import Location, StoreError, sha256
from specauf.cache.objects import entry_of
from specauf.cache.reader import FEATURE_FIT, TARGET, stored_codec
from specauf.cache.schema import FORMAT_VERSION, CommitRecord, Counts, Identity, from_json, to_json
from specauf.cache.target import CONFIG, TOKENIZER, WEIGHTS
from specauf.errors import UserError

# All that it takes to write a cache, in one place.
__all__ = [
    "StorageSpec", "begin", "committed_shards", "fit_can_be_read", "fit_digest", "load_codec", "shard_name",
    "tokenizer_files", "write_arrays", "write_manifest", "write_shard", "write_target", "write_target_files",
]  # fmt: skip


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


def load_codec(out: str, identity: Identity) -> FeatureCodec:
    """How features are stored, from the target's files of a cache in the making.

    Raises:
        UserError: the files are damaged.
    """
    place, name = Location(out), f"{TARGET}.json"
    return stored_codec(place, identity, lambda: from_json(CommitRecord, place.read(name), f"{out}/{name}"))


def fit_can_be_read(out: str, identity: Identity) -> bool:
    """Whether `load_codec` works: else no shard can be written, and no repair finds that out before the manifest."""
    try:
        load_codec(out, identity)
    except StoreError:
        raise
    except UserError:
        return False
    return True


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


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()
