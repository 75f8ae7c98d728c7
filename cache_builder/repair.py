"""Checking a cache, and building its bad parts again."""

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from cache_builder.beginning import restore_identity
from cache_builder.config import BUILD, read_told
from cache_builder.lock import BuildLock
from specauf.cache.integrity import RECORD, Problem, verify
from specauf.cache.location import Location, StoreError
from specauf.cache.objects import entry_of
from specauf.cache.reader import FEATURE_FIT, IDENTITY, MANIFEST, TARGET, Cache, open_cache
from specauf.cache.schema import CommitRecord, is_sealed, seal, to_json
from specauf.errors import UserError
from specauf.progress import progress


@dataclass(frozen=True)
class Verdict:
    """What a check found.

    Attributes:
        cache: where it is.
        shards: how many were checked.
        problems: in order of the shards.
        repaired: names of what was built again.
        removed: objects that no record names, deleted.
    """

    cache: str
    shards: int
    problems: list[Problem]
    repaired: list[str]
    removed: list[str] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        """For scripts."""
        problems = [{"shard": p.shard, "field": p.field, "what": p.what} for p in self.problems]
        return {"cache": self.cache, "shards": self.shards, "problems": problems} | {
            "repaired": self.repaired,
            "removed": self.removed,
        }

    def text(self) -> str:
        """For people."""
        lines = [p.what for p in self.problems]
        if self.removed:
            lines.append(f"removed: {', '.join(self.removed)}")
        if self.repaired:
            lines.append(f"built again: {', '.join(self.repaired)}")
        if not self.problems:
            lines.append(f"{self.cache}: {self.shards} shards and the target are whole")
        return "\n".join(lines)


def check(where: str, only: Collection[str] | None = None) -> Verdict:
    """Check every object of a cache.

    Args:
        where: the cache.
        only: names of the shards to read, and `target`, where the others were read before; None reads all.

    Raises:
        UserError: there is no cache, or its manifest cannot be read.
    """
    cache = open_cache(where)
    names = {entry.name for entry in cache.manifest.shards}
    read = names if only is None else names.intersection(only)
    with progress("verify", float(len(read)), unit="shards", initial=0.0) as advance:
        return Verdict(where, len(names), verify(cache, lambda: advance(1.0), only), [])


def repair(
    where: str,
    accelerator: Literal["auto", "cpu", "gpu"] = "auto",
    *,
    model: str | None = None,
    corpus: str | None = None,
) -> Verdict:
    """Check a cache, build again what is bad, and check that.

    Objects inside shards and the target that no record names are deleted, and `identity.json` is written from the
    manifest. Apart from that, a repair that cannot be done leaves the cache as it was.

    Args:
        where: the cache.
        accelerator: where the target runs.
        model: where the target is now, when it has moved; its weights must be the same.
        corpus: where the corpus is now, when it has moved; its documents must be the same.

    Raises:
        UserError: there is no cache, nothing says how it was built, the corpus or the target is no longer what it was,
            or what `build` raises.
    """
    place = Location(where)
    try:
        found = check(where)
        with BuildLock(place):
            cache = open_cache(where)
            removed, repaired = _remove_strays(cache), _restore_identity(cache)
        if removed or repaired:
            found = check(where, only={p.shard for p in found.problems})
            found = replace(found, removed=removed, repaired=repaired)
        bad = _bad_parts(found)
    except StoreError:
        raise
    except UserError as error:
        files = place.files()
        if BUILD not in files and MANIFEST in files and not is_sealed(place.read(MANIFEST)):
            raise UserError(
                f"{where}/{MANIFEST} is damaged, and no {BUILD} says how this cache was built: delete it and run the "
                "command that made the cache again"
            ) from error
        if BUILD not in files or (MANIFEST in files and is_sealed(place.read(MANIFEST))):
            raise  # nothing to go by, or a whole manifest of another format
        # The manifest cannot be read; commit records and what the build was told are enough to write it again.
        found, bad = Verdict(where, 0, [], []), [MANIFEST]
    if any(p.field == BUILD and not p.shard for p in found.problems):
        raise UserError(
            f"{where}/{BUILD}, which says how this cache was built, is damaged or missing: run the build's own command "
            "again, and then this one"
        )
    if not bad:
        return found
    if BUILD not in place.files():
        # A shrunk cache: it was not built from a corpus, and its source may be anywhere.
        names = ", ".join(f"{name}.json" for name in bad)
        raise UserError(f"{where} was not built here: delete {names} and run the command that made it again")
    config = read_told(place.read(BUILD), where, accelerator=accelerator)
    if model is not None:
        config = replace(config, target=replace(config.target, model=model, package=None))
    if corpus is not None:
        config = replace(config, corpus=corpus)
    from cache_builder.driver import build

    build(config, bad)
    after = check(where, None if bad == [MANIFEST] else _built(found.problems))
    if bad == [MANIFEST] and (more := _bad_parts(after)):
        build(config, more)  # what the manifest names could only be looked at with one
        bad, after = [*bad, *more], check(where, _built(after.problems))
    return replace(after, repaired=[*found.repaired, *bad], removed=found.removed)


def _bad_parts(found: Verdict) -> list[str]:
    """Names of what is to be built again."""
    shards = [entry.name for entry in open_cache(found.cache).manifest.shards]
    return sorted({p.shard for p in found.problems} & {TARGET, *shards})


def _built(problems: Sequence[Problem]) -> set[str] | None:
    """What is built for these; None where it may be every shard, for the fit that they were stored with is lost."""
    fit_is_lost = any(p.shard == TARGET and p.field in (RECORD, FEATURE_FIT) for p in problems)
    return None if fit_is_lost else {p.shard for p in problems}


def _remove_strays(cache: Cache) -> list[str]:
    """Delete objects inside shards and the target that no commit record names; returns their names."""
    removed = []
    for folder, record in _records(cache):
        place = cache.place.child(folder)
        for name in sorted(place.files().keys() - record.objects.keys()):
            place.remove(name)
            removed.append(f"{folder}/{name}")
    return removed


def _restore_identity(cache: Cache) -> list[str]:
    """Write `identity.json` from the manifest where it differs, and the manifest if damage was sealed in; its name."""
    place, manifest = cache.place, cache.manifest
    if IDENTITY not in manifest.notes or not restore_identity(place, manifest.identity):
        return []
    notes = manifest.notes | {IDENTITY: entry_of(to_json(manifest.identity))}
    if notes != manifest.notes:
        place.write(MANIFEST, seal(replace(manifest, notes=notes)))
    return [IDENTITY]


def _records(cache: Cache) -> Iterator[tuple[str, CommitRecord]]:
    """Every folder with its commit record, where that is whole."""
    reads: list[tuple[str, Callable[[], CommitRecord]]] = [
        (f"{entry.name}.zarr", functools.partial(cache.record, entry)) for entry in cache.manifest.shards
    ]
    for folder, read in [*reads, (TARGET, lambda: cache.target_record)]:
        try:
            record = read()
        except StoreError:
            raise
        except UserError:
            continue
        yield folder, record
