"""Checking a whole cache: digests, stray objects, offsets, ranges and finiteness, every problem listed."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import numpy as np

from specauf.cache.features import FeatureCodec
from specauf.cache.location import StoreError, sha256
from specauf.cache.logprobs import NO_ENTRY
from specauf.cache.objects import check_listing, read_checked
from specauf.cache.reader import IDENTITY, LOCK, MANIFEST, TARGET, Cache
from specauf.cache.schema import Counts, Identity, ShardEntry, to_json
from specauf.cache.shard import load_shard
from specauf.errors import UserError

# The field of a problem with a commit record.
RECORD = "commit record"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a cache.

    Attributes:
        shard: name of the shard, `target`, or empty for the cache itself.
        field: the field, or what else is wrong.
        what: one line.
    """

    shard: str
    field: str
    what: str

    def __str__(self) -> str:
        return self.what


def verify(
    cache: Cache, advance: Callable[[], object] = lambda: None, only: Collection[str] | None = None
) -> list[Problem]:
    """Check every object of a cache and what the numbers in it must satisfy.

    Args:
        cache: an open cache.
        advance: called after each shard, for a progress bar.
        only: names of the shards to read, and `target`; None reads all.

    Returns:
        Problems, in order of the shards; empty when the cache is whole.

    Raises:
        StoreError: the store does not answer, which says nothing of the cache.
    """
    problems = [*_strays(cache), *_check_notes(cache)]
    if only is None or TARGET in only:
        problems += _check_target(cache)
    first = 0
    for entry in cache.manifest.shards:
        if only is None or entry.name in only:
            problems += _check_shard(cache, first, entry)
            advance()
        first += entry.counts.documents
    return problems


def _strays(cache: Cache) -> Iterator[Problem]:
    shards = [s.name for s in cache.manifest.shards]
    known = {MANIFEST, LOCK, f"{TARGET}.json", *cache.manifest.notes, *(f"{s}.json" for s in shards)}
    folders = {TARGET, *(f"{s}.zarr" for s in shards)}
    for name in cache.place.files():
        if name not in known and name.split("/", 1)[0] not in folders:
            yield Problem("", "listing", f"{name} is not in {MANIFEST}: delete it")


def _check_notes(cache: Cache) -> Iterator[Problem]:
    found = cache.place.read_all(sorted(cache.manifest.notes))
    for name, entry in cache.manifest.notes.items():
        # A build may have sealed the damage in: what the identity is stands in the manifest itself.
        other = name == IDENTITY and found.get(name) != to_json(cache.manifest.identity)
        if name not in found or sha256(found[name]) != entry.sha256 or other:
            yield Problem("", name, f"{name} is {'damaged' if name in found else 'missing'}")


def _check_target(cache: Cache) -> Iterator[Problem]:
    lines: list[str] = []
    try:
        record, place = cache.target_record, cache.place.child(TARGET)
    except StoreError:
        raise  # nothing is known to be wrong
    except UserError as error:
        yield _record_problem(TARGET, error)
        return
    read_checked(place, record, record.objects, lines)
    check_listing(place, record, lines)
    yield from (_object_problem(TARGET, line) for line in lines)


def _check_shard(cache: Cache, first: int, entry: ShardEntry) -> Iterator[Problem]:
    """Digests first; what the numbers say is looked at only when the bytes are right."""
    try:
        record = cache.record(entry)
    except StoreError:
        raise
    except UserError as error:
        yield _record_problem(entry.name, error)
        return
    lines: list[str] = []
    place, codec = cache.place.child(f"{entry.name}.zarr"), FeatureCodec("none", 0)
    check_listing(place, record, lines)
    # One whose documents were all left out has no arrays.
    shard = load_shard(place, record, first, codec, problems=lines) if entry.counts.documents else None
    yield from (_object_problem(entry.name, line) for line in lines)
    if shard is None:
        return
    for field, what in content_problems(shard.arrays, cache.manifest.identity):
        yield Problem(entry.name, field, f"{entry.name}: field {field}: {what}")
    counted = count(shard.arrays)
    for name in ("documents", "held_out_documents", "tokens", "supervised_tokens", "rows"):
        found, expected = getattr(counted, name), getattr(entry.counts, name)
        if found != expected:
            yield Problem(entry.name, name, f"{entry.name}: {name} is {found}, {MANIFEST} says {expected}")


def _record_problem(name: str, error: UserError) -> Problem:
    return Problem(name, RECORD, str(error).split(": ", 1)[1])


def _object_problem(name: str, line: str) -> Problem:
    return Problem(name, line.split("field ", 1)[1].split(":", 1)[0], line)


def count(a: dict[str, np.ndarray]) -> Counts:
    """What a shard's arrays hold."""
    return Counts(
        documents=len(a["held_out"]),
        held_out_documents=int(a["held_out"].sum()),
        tokens=len(a["tokens"]),
        supervised_tokens=int(a["loss_mask"].sum()),
        rows=len(a["row_index"]),
    )


def content_problems(a: dict[str, np.ndarray], identity: Identity) -> Iterator[tuple[str, str]]:
    """Field and fault of every rule that a shard's arrays break."""
    tokens, rows, k = len(a["tokens"]), len(a["row_index"]), identity.k
    width = identity.sketch_rank if identity.features == "sketch" else identity.feature_width
    shapes = {
        "loss_mask": (tokens,),
        "doc_offsets": (len(a["held_out"]) + 1,),
        "topk_ids": (rows, k),
        "topk_logprobs": (rows, k),
        "head_mass": (rows,),
        "features": (tokens, width),
        "sketch": (tokens, width),
    }
    wrong = {n: s for n, s in shapes.items() if n in a and a[n].shape != s}
    for name, shape in wrong.items():
        yield name, f"shape is {a[name].shape}, expected {shape}"
    if wrong:
        return
    offsets, index = a["doc_offsets"], a["row_index"]
    if offsets[0] != 0 or offsets[-1] != tokens or (np.diff(offsets) <= 0).any():
        yield "doc_offsets", f"must rise from 0 to {tokens}"
    if rows and (index[0] < 0 or index[-1] >= tokens - 1 or (np.diff(index) <= 0).any()):
        yield "row_index", f"must rise within 0 to {tokens - 2}"
    elif rows and not a["loss_mask"][index + 1].all():
        yield "row_index", "has a row whose next token is not supervised"
    for name in ("tokens", "id_table"):
        if a[name].size and a[name].max() >= identity.vocab_size:
            yield name, f"holds id {a[name].max()}, the vocabulary has {identity.vocab_size}"
    if rows and a["topk_ids"].max() >= len(a["id_table"]):
        yield "topk_ids", f"holds rank {a['topk_ids'].max()}, id_table has {len(a['id_table'])}"
    if rows and a["topk_logprobs"].sum(1, dtype=np.int64).max() > NO_ENTRY:
        yield "topk_logprobs", "has a row that does not fall from its most probable entry on"
    if "feature_scale" in a and not np.isfinite(a["feature_scale"]).all():
        yield "feature_scale", "holds NaN or Inf"
    if identity.features == "bf16" and ((a["features"] & 0x7F80) == 0x7F80).any():
        yield "features", "holds NaN or Inf"
