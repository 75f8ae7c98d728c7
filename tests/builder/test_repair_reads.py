"""A repair reads a shard once, and again only what it may have built: a cache may take hours to read."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cache_builder.repair import repair
from specauf.cache.location import Location
from tests.builder.conftest import Make, digests, write_jsonl

SHARDS = ("shard-00000", "shard-00001", "shard-00002")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "corpus.jsonl", [{"prompt": f"question number {i}"} for i in range(24)])


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each shard's arrays are read."""
    found: Counter[str] = Counter()
    views = Location.read_views

    def counted(self: Location, names: list[str]) -> Any:
        found[Path(self.url).stem] += 1
        return views(self, names)

    monkeypatch.setattr(Location, "read_views", counted)
    return found


def _stray(cache: Path) -> None:
    (cache / "shard-00001.zarr/.DS_Store").write_bytes(b"x")


def _array(cache: Path) -> None:
    (cache / "shard-00001.zarr/sketch/c/0/0").write_bytes(b"")


def _both(cache: Path) -> None:
    _array(cache)
    (cache / "shard-00002.zarr/.DS_Store").write_bytes(b"x")


def _weights(cache: Path) -> None:
    (cache / "target/weights.safetensors").write_bytes(b"")


def _fit(cache: Path) -> None:
    (cache / "target/features.safetensors").write_bytes(b"")


def _manifest(cache: Path) -> None:
    _array(cache)
    (cache / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        (_stray, (1, 2, 1)),
        (_array, (1, 2, 1)),
        (_both, (1, 3, 2)),
        (_weights, (1, 1, 1)),
        (_fit, (2, 2, 2)),  # all would have been made again, had the fit come out otherwise
        (_manifest, (1, 2, 1)),
    ],
)
def test_a_repair_reads_again_what_it_built(
    make: Make, reads: Counter[str], harm: Callable[[Path], None], expected: tuple[int, ...]
) -> None:
    cache = make()
    whole = digests(cache)
    harm(cache)
    reads.clear()
    assert repair(str(cache), "cpu").problems == []
    assert tuple(reads[name] for name in SHARDS) == expected
    assert digests(cache) == whole
