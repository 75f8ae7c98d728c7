"""Checking a cache, and building its bad parts again."""

from dataclasses import dataclass
from typing import Any, Literal

from cache_builder.config import BUILD, read_told
from specauf.cache.integrity import Problem, verify
from specauf.cache.location import Location
from specauf.cache.reader import MANIFEST, TARGET, open_cache
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
    """

    cache: str
    shards: int
    problems: list[Problem]
    repaired: list[str]

    def figures(self) -> dict[str, Any]:
        """For scripts."""
        problems = [{"shard": p.shard, "field": p.field, "what": p.what} for p in self.problems]
        return {"cache": self.cache, "shards": self.shards, "problems": problems, "repaired": self.repaired}

    def text(self) -> str:
        """For people."""
        lines = [p.what for p in self.problems]
        if self.repaired:
            lines.append(f"built again: {', '.join(self.repaired)}")
        if not self.problems:
            lines.append(f"{self.cache}: {self.shards} shards and the target are whole")
        return "\n".join(lines)


def check(where: str) -> Verdict:
    """Check every object of a cache.

    Raises:
        UserError: there is no cache, or its manifest cannot be read.
    """
    cache = open_cache(where)
    with progress("verify", float(cache.num_shards), unit="shards", initial=0.0) as advance:
        return Verdict(where, cache.num_shards, verify(cache, lambda: advance(1.0)), [])


def repair(where: str, accelerator: Literal["auto", "cpu", "gpu"] = "auto") -> Verdict:
    """Check a cache, build again what is bad, and check it once more.

    Raises:
        UserError: there is no cache, the corpus or the target is no longer what it was, or what `build` raises.
    """
    place = Location(where)
    try:
        found = check(where)
        bad = sorted({p.shard for p in found.problems} & {TARGET, *_shards(where)})
    except UserError:
        if BUILD not in place.files():
            raise
        # The manifest cannot be read; commit records and what the build was told are enough to write it again.
        bad = [MANIFEST]
    if not bad:
        return found
    if BUILD not in place.files():
        # A shrunk cache: it was not built from a corpus, and its source may be anywhere.
        names = ", ".join(f"{name}.json" for name in bad)
        raise UserError(f"{where} was not built here: delete {names} and run the command that made it again")
    config = read_told(place.read(BUILD), where, accelerator=accelerator)
    from cache_builder.driver import build

    for name in bad:
        place.remove(name if name == MANIFEST else f"{name}.json")
    build(config)
    after = check(where)
    return Verdict(where, after.shards, after.problems, bad)


def _shards(where: str) -> list[str]:
    return [s.name for s in open_cache(where).manifest.shards]
