"""From documents to the bytes of a shard: the arrays of the format, each one sharded Zarr object.

The same documents give the same bytes, whoever encodes them.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import zarr
from torch import Tensor
from zarr.codecs import BloscCodec
from zarr.storage import MemoryStore

from cache_builder.document import BuiltDocument
from cache_builder.features import FeatureEncoder
from specauf.cache import logprobs
from specauf.cache.features import FeatureCodec
from specauf.cache.schema import Identity
from specauf.errors import UserError

# Decoded. Threads share a shard's work by chunks; one Blosc block each: smaller ones take more bytes and more time.
CHUNK_BYTES = 1 << 20
GROUP_TOKENS = 4096
_NOISE = ("features", "sketch")


def shard_arrays(
    documents: Sequence[BuiltDocument],
    identity: Identity,
    codec: FeatureCodec,
    device: torch.device | str = "cpu",
) -> dict[str, np.ndarray]:
    """A shard's arrays as stored.

    Args:
        documents: at least one.
        identity: of the cache.
        codec: how features are stored.
        device: where to work on features.

    Raises:
        UserError: log-probabilities or features hold NaN or Inf, features are missing, or an id is unknown.
    """
    lengths = np.array([len(d.tokens) for d in documents])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = np.concatenate([d.topk_ids for d in documents])
    values = np.concatenate([d.topk_logprobs for d in documents]).astype(np.float64)
    if np.isnan(values).any() or np.isposinf(values).any():
        raise UserError("the target's log-probabilities hold NaN or Inf: compute in float32, or check the weights")
    ids = np.where(np.isneginf(values), ids[:, :1], ids)
    vocab_size = identity.vocab_size
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
    if codec.kind != "none":
        parts = [d.features for d in documents if d.features is not None]
        if len(parts) != len(documents):
            raise UserError(f"features are {codec.kind}, but {len(documents) - len(parts)} documents have none")
        arrays |= feature_arrays(parts, codec, device)
    return arrays


def feature_arrays(
    parts: Sequence[Tensor], codec: FeatureCodec, device: torch.device | str = "cpu"
) -> dict[str, np.ndarray]:
    """The arrays that store the features of a shard's documents.

    Args:
        parts: features of each document.
        codec: how they are stored.
        device: where to work on them.

    Raises:
        UserError: the features hold NaN or Inf.
    """
    encode = FeatureEncoder(codec, device)
    encoded = [encode(torch.cat(group)) for group in _groups(parts)]
    return {name: np.concatenate([e[name] for e in encoded]) for name in encoded[0]}


def field_attributes(names: Collection[str], identity: Identity) -> dict[str, dict[str, Any]]:
    """What each field's metadata says of its encoding."""
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
    features = {"encoding": identity.features, "taps": list(identity.taps)}
    attributes |= dict.fromkeys(("features", "sketch", "feature_scale"), features)
    return {name: attributes[name] for name in names if name in attributes}


def _groups(parts: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Documents' features in groups of so many tokens that a group's work is worth sharing among threads."""
    start = tokens = 0
    for stop, part in enumerate(parts, 1):
        tokens += len(part)
        if tokens >= GROUP_TOKENS or stop == len(parts):
            yield list(parts[start:stop])
            start, tokens = stop, 0


def encode_group(
    arrays: Mapping[str, np.ndarray],
    attributes: Mapping[str, Mapping[str, Any]],
    *,
    compress_features: bool = False,
) -> dict[str, bytes]:
    """A Zarr v3 group's objects by name; each array is one sharded object.

    Args:
        arrays: by field name.
        attributes: of some of them.
        compress_features: features and sketches as well; they are almost noise, and reading pays for what disk saves.
    """
    store = MemoryStore({})
    group = zarr.create_group(store, zarr_format=3)
    for name, array in arrays.items():
        most = max(1, CHUNK_BYTES // max(1, array.dtype.itemsize * int(np.prod(array.shape[1:]))))
        count = -(-max(1, len(array)) // most)
        # Chunks are all of one size, and the last one is stored whole: equal shares leave the least of it empty.
        rows = -(-max(1, len(array)) // count)
        stored = group.create_array(
            name,
            shape=array.shape,
            chunks=(rows, *array.shape[1:]),
            shards=(count * rows, *array.shape[1:]),
            dtype=array.dtype,
            compressors=[] if name in _NOISE and not compress_features else [_compressor(name, array)],
            fill_value=0,
            attributes=dict(attributes.get(name, {})),
            config={"write_empty_chunks": True},
        )
        if array.size:
            stored[...] = array
    return {name: value.to_bytes() for name, value in store._store_dict.items()}


def _compressor(name: str, array: np.ndarray) -> BloscCodec:
    """Zstandard, one block a chunk, at a level that costs the builder nothing it would notice.

    Planes of bits are a fortieth smaller than planes of bytes for the two large arrays, and larger for all others.
    """
    return BloscCodec(
        cname="zstd",
        clevel=1 if name in _NOISE else 5,
        shuffle="bitshuffle" if name in ("topk_ids", "topk_logprobs") else "shuffle",
        typesize=array.dtype.itemsize,
        blocksize=CHUNK_BYTES,
    )
