"""Reading stored objects, each compared with the digest in its commit record before anyone uses it."""

from collections.abc import Iterable

from specauf.cache.location import Location, sha256
from specauf.cache.schema import CommitRecord
from specauf.errors import UserError


def field_of(name: str) -> str:
    """The field an object belongs to: `tokens/c/0` is part of tokens, the group's own `zarr.json` of no field."""
    return "group" if name == "zarr.json" else name.split("/", 1)[0]


def read_checked(
    place: Location, record: CommitRecord, names: Iterable[str], problems: list[str] | None = None
) -> dict[str, bytes]:
    """Objects' bytes, each compared with the commit record.

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
    for name in names:
        entry, where = record.objects[name], f"{record.name}: field {field_of(name)}: object {name}"
        if name not in found:
            problem = f"{where} is missing"
        elif len(found[name]) != entry.bytes:
            problem = f"{where} has {len(found[name]):,} bytes, expected {entry.bytes:,}"
        elif sha256(found[name]) != entry.sha256:
            problem = f"{where} is damaged: its sha256 differs from the commit record"
        else:
            continue
        _note(place, problem, problems)
    return found


def check_listing(place: Location, record: CommitRecord, problems: list[str] | None = None) -> None:
    """Find objects that the commit record does not know; arguments and errors as `read_checked`."""
    for name in sorted(place.files().keys() - record.objects.keys()):
        _note(place, f"{record.name}: field {field_of(name)}: object {name} is not in the commit record", problems)


def _note(place: Location, problem: str, problems: list[str] | None) -> None:
    if problems is None:
        raise UserError(f"cache {place.url}: {problem}: run cache-builder verify --repair")
    problems.append(problem)
