"""A smaller cache from a larger one, without the target: fewer log-probabilities, or features stored smaller.

Whoever wants to choose between sizes builds the largest once. From bf16 features a sketch or int8 comes out as the same
arrays that a build would have stored; from a sketch a smaller one does, for its basis is ordered.
"""

import itertools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from cache_builder.beginning import require_place
from cache_builder.config import BuildConfig
from cache_builder.encode import feature_arrays
from cache_builder.fit import Fitting
from cache_builder.lock import BuildLock
from cache_builder.manifest import forget_shards
from cache_builder.writer import (
    StorageSpec,
    begin,
    committed_shards,
    fit_can_be_read,
    fit_digest,
    load_codec,
    write_arrays,
    write_manifest,
    write_target_files,
)
from specauf.cache import Cache, FeatureCodec, Identity, logprobs, open_cache
from specauf.cache.features import decode_sketch
from specauf.cache.location import Location, sha256
from specauf.cache.objects import read_checked
from specauf.cache.reader import FEATURE_FIT, TARGET, fields_to_read
from specauf.cache.schema import CommitRecord, FeatureKind, Manifest
from specauf.cache.shard import FEATURE_FIELDS
from specauf.errors import UserError
from specauf.progress import progress

Arrays = dict[str, np.ndarray]
# What each kind of features can become.
_BECOMES: dict[FeatureKind, tuple[FeatureKind, ...]] = {
    "bf16": ("bf16", "int8", "sketch", "none"),
    "int8": ("int8", "sketch", "none"),
    "sketch": ("sketch", "none"),
    "none": ("none",),
}


def shrink(
    source: str,
    out: str,
    *,
    k: int | None = None,
    features: FeatureKind | None = None,
    sketch_rank: int | None = None,
    compress_features: bool | None = None,
) -> Manifest:
    """Write the smaller cache; a run that was killed goes on where it stopped.

    Args:
        source: the larger cache.
        out: directory or fsspec URL of the smaller one.
        k: log-probabilities kept per row; the source's when None.
        features: how taps are stored; as in the source when None.
        sketch_rank: of a sketch; the source's rank, or else the target's hidden size, when None.
        compress_features: also compress their arrays; as in the source when None.

    Raises:
        UserError: the source does not hold what is asked for, is damaged, or `out` holds another cache, or this
            one with features compressed otherwise.
    """
    cache = open_cache(source)
    identity = smaller_identity(cache, k, features, sketch_rank)
    require_place(out)
    place = Location(out)
    with (
        BuildLock(place) as lock,
        progress("shrink", float(cache.num_shards), unit="shards", initial=0.0) as advance,
    ):
        begin(out, identity)
        place.sweep()
        if f"{TARGET}.json" not in place.files() or not fit_can_be_read(out, identity):
            record = cache.target_record
            files = read_checked(cache.place.child(TARGET), record, list(record.objects))
            codec = _codec(cache, identity)
            _forget_other_fit(place, identity, codec)
            write_target_files(out, identity, files, codec)
        if compress_features is None:
            compress_features = _compressed(cache.place, cache.record(cache.entries[0]))
        spec = StorageSpec(identity, load_codec(out, identity), compress_features, confirm=lock.confirm)
        done = committed_shards(out, identity)
        for record in list(done.values())[:1]:
            if identity.features != "none" and (before := _compressed(place, record)) != compress_features:
                raise UserError(
                    f"compress_features: {before} in the features that {out} holds, {compress_features} now: give the "
                    "same, or another --out"
                )
        for number in range(cache.num_shards):
            lock.check()
            if number not in done:
                record = cache.record(cache.entries[number])
                arrays = smaller_arrays(cache, number, spec)
                write_arrays(out, number, arrays, spec, record.counts.argmax_is_data_sum, record.drops)
            advance(1)
        lock.confirm()
        return write_manifest(out, identity, cache.num_shards, _drops_of_plan(cache))


def _forget_other_fit(place: Location, identity: Identity, codec: FeatureCodec) -> None:
    """Let shards be made again that were, or may have been, stored with another fit, which would decode them wrongly.

    A sample's eigenvectors may come out with other signs on another machine.
    """
    found = place.child(TARGET).read_all([FEATURE_FIT]).get(FEATURE_FIT)
    digest = fit_digest(codec)
    if digest is not None and (found is None or sha256(found) != digest):
        forget_shards(place.url, identity)


def smaller_identity(cache: Cache, k: int | None, features: FeatureKind | None, sketch_rank: int | None) -> Identity:
    """What the smaller cache is made from: the larger one's identity, with its fingerprint.

    Raises:
        UserError: the source does not hold what is asked for.
    """
    old = cache.manifest.identity
    kind = old.features if features is None else features
    if kind not in _BECOMES[old.features]:
        known = ", ".join(_BECOMES[old.features])
        raise UserError(f"features: {kind} asked for, {cache.url} has {old.features}, which can become {known}")
    k = old.k if k is None else k
    if not 1 <= k <= old.k:
        raise UserError(f"k: {k} asked for, {cache.url} has {old.k}: give 1 to {old.k}")
    if sketch_rank is not None and kind != "sketch":
        raise UserError(
            f"sketch_rank: {sketch_rank} given with features {kind}: give --features=sketch, or leave it out"
        )
    most = old.sketch_rank if old.features == "sketch" else old.feature_width
    rank = (old.sketch_rank or old.hidden_size if sketch_rank is None else sketch_rank) if kind == "sketch" else 0
    if kind == "sketch" and not 1 <= rank <= most:
        raise UserError(f"sketch_rank: {rank} asked for, {cache.url} allows 1 to {most}")
    corpus = old.corpus | {"shrunk_from": cache.fingerprint}
    return replace(old, k=k, features=kind, sketch_rank=rank, corpus=corpus)


def smaller_arrays(cache: Cache, number: int, spec: StorageSpec) -> Arrays:
    """One shard's arrays as the smaller cache stores them."""
    old, new = cache.manifest.identity, spec.identity
    stored = dict(cache.shard(number, fields_to_read(topk=True, features=new.features != "none")).arrays)
    arrays = {name: array for name, array in stored.items() if name not in FEATURE_FIELDS}
    if new.k < old.k:
        arrays |= _fewer(stored, new)
    if (new.features, new.sketch_rank) == (old.features, old.sketch_rank):
        arrays |= {name: stored[name] for name in FEATURE_FIELDS if name in stored}
    elif new.features != "none":
        codec = _first_columns(old.sketch_rank, new.sketch_rank) if old.features == "sketch" else spec.codec
        arrays |= feature_arrays(list(_features(cache, stored)), codec)
    return arrays


def _compressed(place: Location, record: CommitRecord) -> bool:
    """Whether a cache's features are compressed, by the metadata of one shard's array."""
    names = [name for field in ("features", "sketch") if (name := f"{field}/zarr.json") in record.objects]
    found = read_checked(place.child(f"{record.name}.zarr"), record, names)
    return any('"blosc"' in data.decode() for data in found.values())


def _fewer(stored: Arrays, new: Identity) -> Arrays:
    values = logprobs.decode_logprobs(stored["topk_logprobs"], logprobs.decode_head_mass(stored["head_mass"]))
    ids = logprobs.decode_ids(stored["topk_ids"][:, : new.k], stored["id_table"])
    ranks, table = logprobs.encode_ids(ids, new.vocab_size)
    mass = np.exp(values[:, : new.k].astype(np.float64)).sum(1)
    return {
        "topk_ids": ranks,
        "id_table": table,
        "topk_logprobs": stored["topk_logprobs"][:, : new.k],  # differences along k, from the first on
        "head_mass": logprobs.encode_head_mass(mass),
    }


def _features(cache: Cache, stored: Arrays) -> Iterator[Tensor]:
    """What each document of a shard stores of features, decoded: taps, or the coordinates of a sketch."""
    offsets = stored["doc_offsets"]
    codes, scale = stored.get("features", stored.get("sketch")), stored.get("feature_scale")
    assert codes is not None
    for start, stop in itertools.pairwise(offsets):
        part = codes[start:stop]
        if cache.codec.kind == "sketch":
            assert scale is not None
            yield torch.from_numpy(decode_sketch(part, scale[start:stop]))
        else:
            rows = None if scale is None else scale[start:stop]
            yield torch.from_numpy(cache.codec.decode(part, rows))


def _first_columns(rank: int, kept: int) -> FeatureCodec:
    """Encodes coordinates of a sketch as those of its first columns, which are those of its largest eigenvalues."""
    return FeatureCodec("sketch", 1, np.ones(rank, np.float32), np.eye(rank, kept, dtype=np.float32))


def _codec(cache: Cache, new: Identity) -> FeatureCodec:
    """How the smaller cache stores features, fitted on the first shard as a build does."""
    old, codec = cache.manifest.identity, cache.codec
    if new.features == old.features:
        basis = codec.basis if codec.basis is None else np.ascontiguousarray(codec.basis[:, : new.sketch_rank])
        return replace(codec, basis=basis)
    fitting = Fitting(
        new.features, len(new.taps), new.sketch_rank, int(old.corpus.get("fit_tokens", BuildConfig.fit_tokens))
    )
    return fitting.codec(_features(cache, dict(cache.shard(0).arrays)) if fitting.needed else [])


def _drops_of_plan(cache: Cache) -> dict[str, int]:
    """Documents that were left out before any shard was made, or with all others of their shard."""
    left = dict(cache.manifest.drops)
    for entry in cache.entries:
        for reason, count in cache.record(entry).drops.items():
            left[reason] -= count
    return {reason: count for reason, count in left.items() if count}
