"""Whose directory it is: the identity that a build writes first, or finds there and must share."""

import contextlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from specauf.cache.location import Location, StoreError
from specauf.cache.reader import IDENTITY, LOCK, MANIFEST
from specauf.cache.schema import Identity, from_json, open_sealed, to_json
from specauf.errors import UserError
from specauf.fingerprint import comparable

# Beside these stand digests of what is in the files.
_NAMES = {"corpus.name", "target.id"}


def require_place(out: str) -> None:
    """Check that a cache can be put somewhere at all.

    Raises:
        UserError: it is nowhere, is a file, or lies inside another cache, which would no longer be whole.
    """
    if not out.strip():
        raise UserError("out is empty, expected a directory for the cache: give --out")
    place = Location(out)
    if place.is_file():
        raise UserError(f"{out} is a file, expected a directory for the cache: give another --out")
    for folder in _above(place):
        with contextlib.suppress(StoreError, OSError):  # it may be closed but for what lies below
            if begun_with(folder) is not None:
                raise UserError(f"{out} lies inside the cache {folder}: give another --out")


def _above(place: Location) -> list[str]:
    if place.local is not None:
        return [str(folder) for folder in place.local.resolve().parents]
    store, sign, path = place.url.rpartition("://")
    names = path.strip("/").split("/")
    return [store + sign + "/".join(names[:count]) for count in range(1, len(names))]


def begin(cache_dir: str, identity: Identity, *, damaged_manifest: bool = False) -> None:
    """Mark a directory as this cache's, or check that it is: the first thing a build does.

    Args:
        cache_dir: the directory.
        identity: of the cache.
        damaged_manifest: there is one, and it cannot be read; the other files say whose the directory is.

    Raises:
        UserError: as `require_place`, or the directory holds a cache of another identity, whose fields are named with
            both values, or nothing says what it holds.
    """
    require_place(cache_dir)
    place = Location(cache_dir)
    unasked = {LOCK, "build.json"} | ({MANIFEST} if damaged_manifest else set())
    names = [n for n in place.files() if n not in unasked]
    if MANIFEST in names:
        found = open_sealed(place.read(MANIFEST), f"{cache_dir}/{MANIFEST}").identity
    elif set(names) <= {IDENTITY}:
        found = identity  # nothing is stored yet, so nothing is lost by other settings
    elif IDENTITY in names:
        found = _begun_as(place)
    else:
        raise UserError(f"{cache_dir} holds {names[0]!r} and no cache: give another --out")
    differ = [f"{name} is {old!r}, this build has {new!r}" for name, (old, new) in differences(found, identity).items()]
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


def differences(found: Identity, here: Identity) -> dict[str, tuple[Any, Any]]:
    """Fields of two identities that differ, with both values, by their dotted names."""
    old, new = asdict(found), asdict(here)
    old["target"], new["target"] = comparable(found.target, here.target)
    return _fields_that_differ(old, new)


def _fields_that_differ(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Fields with both values; of mappings only the entries that differ, by their dotted names."""
    found: dict[str, tuple[Any, Any]] = {}
    for name in sorted({*old, *new}, key=lambda name: (list(old).index(name) if name in old else len(old), name)):
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found |= {f"{name}.{key}": pair for key, pair in _fields_that_differ(a, b).items()}
        elif a != b:
            found[name] = (a, b)
    return found


def says_whose(place: Location) -> bool:
    """Whether `identity.json` can be read."""
    try:
        from_json(Identity, place.read(IDENTITY), IDENTITY)
    except StoreError:
        raise
    except (FileNotFoundError, NotADirectoryError, UserError):
        return False
    return True


def as_begun(out: str, identity: Identity) -> Identity:
    """The identity under which this cache was begun, when nothing differs but the release or where files lie now.

    The cache goes on under that one.
    """
    for found in begun(out):
        names = _NAMES if "fingerprint" in identity.target else _NAMES - {"target.id"}
        differ = differences(found, identity)
        if differ.keys() <= {"code_version"} | names:
            if "code_version" in differ:
                print(
                    "{} was begun by specauf {} and goes on with {}".format(out, *differ["code_version"]),
                    file=sys.stderr,
                )
            return found
    return identity


def begun(out: str) -> Iterator[Identity]:
    """What a cache that is there says of itself: in its manifest, and where it was begun."""
    place = Location(out)
    for name in (MANIFEST, IDENTITY):
        try:
            data = place.read(name)
            yield open_sealed(data, name).identity if name == MANIFEST else from_json(Identity, data, name)
        except StoreError:
            raise
        except (FileNotFoundError, NotADirectoryError, UserError):
            continue  # `begin` says what is wrong


def begun_with(out: str) -> Identity | None:
    """The first of these, as far as it can be read."""
    return next(begun(out), None)
