"""The commit records of a cache's shards, and the manifest that sums them up."""

import json
import re
import sys
from collections.abc import Mapping, Sequence

from specauf.cache.location import Location, sha256
from specauf.cache.logprobs import smallest_uint
from specauf.cache.objects import entry_of, field_of
from specauf.cache.reader import MANIFEST, NOTES, TARGET
from specauf.cache.schema import (
    FORMAT_VERSION,
    CommitRecord,
    Counts,
    FieldInfo,
    Identity,
    Manifest,
    ShardEntry,
    from_json,
    seal,
    to_json,
)
from specauf.errors import UserError

_TABLE = "id_table/zarr.json"
_RECORD = re.compile(r"shard-\d{5,}\.json")


def shard_name(number: int) -> str:
    """`shard-00007` for 7."""
    return f"shard-{number:05d}"


def committed_shards(cache_dir: str, identity: Identity) -> dict[int, CommitRecord]:
    """Commit records of the shards that are whole, by shard number.

    Raises:
        UserError: a record belongs to another identity or cannot be read.
    """
    place, records = Location(cache_dir), {}
    # One request for all: a store takes as long for one as for many at once.
    for file, data in place.read_all([name for name in place.files() if _RECORD.fullmatch(name)]).items():
        name = file.removesuffix(".json")
        record = from_json(CommitRecord, data, f"{cache_dir}/{file}")
        if record.identity != identity.digest or record.name != name:
            raise UserError(f"{cache_dir}/{file} belongs to another cache: delete it, or give another --out")
        records[int(name.removeprefix("shard-"))] = record
    return dict(sorted(records.items()))


def forget_shards(cache_dir: str, identity: Identity) -> None:
    """Let every stored document be made again, for features were fitted anew and came out otherwise."""
    place = Location(cache_dir)
    stored = [r.name for r in committed_shards(cache_dir, identity).values() if r.counts.documents]
    if stored:
        print(f"features were fitted anew and came out otherwise: {len(stored)} shards are made again", file=sys.stderr)
    place.remove(MANIFEST)  # which tells their records
    for name in stored:
        place.remove(f"{name}.json")


def write_manifest(cache_dir: str, identity: Identity, shards: int, drops: Mapping[str, int] | None = None) -> Manifest:
    """Finish a cache: sum up its commit records into the manifest.

    Args:
        cache_dir: the cache, with all shards committed.
        identity: of the cache.
        shards: how many there are.
        drops: documents left out before any shard was made, by reason.

    Raises:
        UserError: a shard is missing or damaged, or none holds a document.
    """
    place, records = Location(cache_dir), committed_shards(cache_dir, identity)
    missing = sorted(set(range(shards)) - records.keys())
    if missing:
        raise UserError(f"{cache_dir}: {shard_name(missing[0])} is missing: run the same build again")
    counts, total = Counts(), dict(drops or {})
    entries = []
    for record in records.values():
        counts = counts + record.counts
        for reason, dropped in record.drops.items():
            total[reason] = total.get(reason, 0) + dropped
        stored = sum(o.bytes for o in record.objects.values())
        entries.append(ShardEntry(record.name, record.counts, stored, sha256(to_json(record))))
    if not counts.documents:
        said = ", ".join(f"{n} {reason}" for reason, n in sorted(total.items()))
        raise UserError(f"{cache_dir}: no document is left to store ({said}): relax what drops them")
    fields = _fields(place, identity, [r for r in records.values() if r.counts.documents])
    target = sha256(place.read(f"{TARGET}.json"))
    notes = {name: entry_of(data) for name, data in place.read_all(list(NOTES)).items()}
    manifest = Manifest(FORMAT_VERSION, identity, counts, total, fields, tuple(entries), target, notes)
    place.write(MANIFEST, seal(manifest))
    return manifest


def _fields(place: Location, identity: Identity, records: Sequence[CommitRecord]) -> dict[str, FieldInfo]:
    """The table of fields, of shards that hold documents.

    Types and widths are the format's, and rows are counted in the records, but for the tables of ids.
    """
    tables = _table_lengths(place, records)
    counts = sum((r.counts for r in records), Counts())
    a_token, a_row, many = counts.tokens, counts.rows, identity.feature_width
    ids = smallest_uint(identity.vocab_size - 1).name
    scales = len(identity.taps) if identity.features == "int8" else 1
    known = {
        "tokens": (ids, 1, a_token),
        "loss_mask": ("bool", 1, a_token),
        "doc_offsets": ("int64", 1, counts.documents + len(records)),
        "held_out": ("bool", 1, counts.documents),
        "row_index": ("int64", 1, a_row),
        "id_table": (ids, 1, sum(tables)),
        "topk_ids": (smallest_uint(max(0, max(tables) - 1)).name, identity.k, a_row),
        "topk_logprobs": ("uint16", identity.k, a_row),
        "head_mass": ("int16", 1, a_row),
        "features": ("int8" if identity.features == "int8" else "uint16", many, a_token),
        "sketch": ("int8", identity.sketch_rank, a_token),
        "feature_scale": ("float32", scales, a_token),
    }
    stored: dict[str, int] = {}
    for record in records:
        for file, entry in record.objects.items():
            if "/" in file:
                stored[field_of(file)] = stored.get(field_of(file), 0) + entry.bytes
    return {name: FieldInfo(*known[name], stored[name]) for name in sorted(stored)}


def _table_lengths(place: Location, records: Sequence[CommitRecord]) -> list[int]:
    """How many ids each shard's table holds, by its metadata."""
    names = [f"{r.name}.zarr/{_TABLE}" for r in records]
    found = place.read_all(names)
    for record, name in zip(records, names, strict=True):
        if name not in found or sha256(found[name]) != record.objects[_TABLE].sha256:
            what = "damaged" if name in found else "missing"
            raise UserError(f"{place.url}: {name} is {what}: delete {record.name}.json and run the same command again")
    return [int(json.loads(found[name])["shape"][0]) for name in names]
