"""Damage that several files show together, or that lies where nobody looks first."""

import re
from pathlib import Path

import pytest

from cache_builder.repair import repair
from cache_builder.shrink import shrink
from tests.builder.conftest import Make, digests, refuse_to_repair, tree, write_jsonl


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "corpus.jsonl", [{"prompt": f"question number {i}"} for i in range(24)])


@pytest.mark.parametrize("field", ["crc32c", "argmax_is_data_sum", "supervised_tokens"])
def test_a_record_that_was_damaged_behind_the_manifest_is_not_sealed_in(make: Make, field: str) -> None:
    cache = make()
    before = digests(cache)
    record = cache / "shard-00001.json"
    text, count = re.subn(rf'"{field}": ?(\d+)', rf'"{field}": 1\1', record.read_text(), count=1)
    assert count, f"nothing to damage in {text}"
    record.write_text(text)
    make()
    assert digests(cache) == before


def test_what_only_a_manifest_shows_to_be_bad_is_built_in_the_same_repair(make: Make) -> None:
    cache = make()
    before = digests(cache)
    (cache / "manifest.json").unlink()
    (cache / "shard-00001.zarr/tokens/c/0").unlink()
    assert repair(str(cache), "cpu").problems == []
    assert digests(cache) == before


def test_a_shard_that_was_moved_to_another_disk_is_repaired(make: Make, tmp_path: Path) -> None:
    cache = make()
    before = tree(cache)
    shard, elsewhere = cache / "shard-00001.zarr", tmp_path / "disk"
    shard.rename(elsewhere)
    shard.symlink_to(elsewhere)
    (elsewhere / "tokens/c/0").write_bytes(b"damage")
    assert repair(str(cache), "cpu").problems == []
    assert tree(cache) == before


def test_a_damaged_manifest_of_a_shrunk_cache_is_no_dead_end(make: Make, tmp_path: Path) -> None:
    make()
    small = tmp_path / "small"
    shrink(str(tmp_path / "cache"), str(small), k=2)
    before = digests(small)
    (small / "manifest.json").write_text("{")
    refuse_to_repair(small, "delete it and run the command that made the cache again")
    (small / "manifest.json").unlink()
    shrink(str(tmp_path / "cache"), str(small), k=2)
    assert digests(small) == before


@pytest.mark.parametrize("victim", ["target/features.safetensors", "target.json"])
@pytest.mark.parametrize("command", ["build", "repair"])
def test_an_unfinished_cache_whose_fit_is_damaged_goes_on(make: Make, victim: str, command: str) -> None:
    cache = make()
    before = digests(cache)
    for name in ("manifest.json", "shard-00002.json"):
        (cache / name).unlink()
    (cache / victim).write_bytes(b"damage")
    if command == "build":
        make()
    assert repair(str(cache), "cpu").problems == []
    assert digests(cache) == before


@pytest.mark.parametrize("victim", ["target/features.safetensors", "target.json"])
def test_an_unfinished_shrunk_cache_whose_fit_is_damaged_goes_on(make: Make, tmp_path: Path, victim: str) -> None:
    make()
    small = tmp_path / "small"
    shrink(str(tmp_path / "cache"), str(small), k=2)
    before = digests(small)
    for name in ("manifest.json", "shard-00002.json"):
        (small / name).unlink()
    (small / victim).write_bytes(b"damage")
    shrink(str(tmp_path / "cache"), str(small), k=2)
    assert digests(small) == before


def test_a_build_does_not_fit_anew_what_is_finished(make: Make) -> None:
    cache = make()
    (cache / "target/features.safetensors").write_bytes(b"damage")
    before = tree(cache)
    make()
    assert tree(cache) == before
