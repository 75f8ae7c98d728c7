"""Reading stored objects, each compared with the digest in its commit record before anyone uses it."""

from collections.abc import Iterable, Mapping, Sequence

from specauf.cache.location import Location, crc32c, sha256
from specauf.cache.schema import CommitRecord, ObjectEntry
from specauf.errors import UserError


def entry_of(data: bytes) -> ObjectEntry:
    """What a record says of an object."""
    return ObjectEntry(len(data), sha256(data), crc32c(data))


def field_of(name: str) -> str:
    """The field an object belongs to: `tokens/c/0` is part of tokens, the group's own `zarr.json` of no field."""
    return "group" if name == "zarr.json" else name.split("/", 1)[0]


def read_checked(
    place: Location, record: CommitRecord, names: Iterable[str], problems: list[str] | None = None
) -> dict[str, bytes]:
    """Objects' bytes, each compared with the sha256 in the commit record.

    Args:
        place: the directory that holds the objects.
        record: its commit record.
        names: objects to read.
        problems: where to note what is wrong, one line each; None raises at the first.

    Raises:
        UserError: an object is missing, truncated or damaged; the message names shard and field.
    """
    names = sorted(names)
    found = place.read_all(names)
    _compare(place, record, names, found, problems, quick=False)
    return found


def read_arrays(
    place: Location, record: CommitRecord, names: Iterable[str], problems: list[str] | None = None
) -> dict[str, bytes | memoryview]:
    """As `read_checked`, for a shard's arrays: by CRC-32C where the record has it, unless problems are to be noted."""
    names = sorted(names)
    found = place.read_views(names)
    _compare(place, record, names, found, problems, quick=problems is None)
    return found


def _compare(
    place: Location,
    record: CommitRecord,
    names: Sequence[str],
    found: Mapping[str, bytes | memoryview],
    problems: list[str] | None,
    *,
    quick: bool,
) -> None:
    for name in names:
        entry, where = record.objects[name], f"{record.name}: field {field_of(name)}: object {name}"
        if name not in found:
            problem = f"{where} is missing"
        elif len(found[name]) != entry.bytes:
            problem = f"{where} has {len(found[name]):,} bytes, expected {entry.bytes:,}"
        else:
            differs = _differs(found[name], entry, quick=quick)
            if differs is None:
                continue
            problem = f"{where} is damaged: its {differs} differs from the commit record"
        _note(place, problem, problems)


def _differs(data: bytes | memoryview, entry: ObjectEntry, *, quick: bool) -> str | None:
    """The checksum by which an object is not what its record says; None when it is."""
    if quick and entry.crc32c is not None:
        return None if crc32c(data) == entry.crc32c else "CRC-32C"
    if sha256(data) != entry.sha256:
        return "sha256"
    return None if entry.crc32c in (None, crc32c(data)) else "CRC-32C"


def check_listing(place: Location, record: CommitRecord, problems: list[str] | None = None) -> None:
    """Find objects that the commit record does not know; arguments and errors as `read_checked`."""
    for name in sorted(place.files().keys() - record.objects.keys()):
        _note(place, f"{record.name}: field {field_of(name)}: object {name} is not in the commit record", problems)


def _note(place: Location, problem: str, problems: list[str] | None) -> None:
    if problems is None:
        raise UserError(f"cache {place.url}: {problem}: run cache-builder verify --repair")
    problems.append(problem)
