"""What a cache says of itself beside its shards, `identity.json` and `build.json`, when that is damaged."""

from dataclasses import replace
from pathlib import Path

import pytest

from cache_builder.config import BUILD
from cache_builder.repair import check, repair
from specauf.cache import open_cache
from specauf.cache.objects import entry_of
from specauf.cache.reader import IDENTITY
from specauf.cache.schema import seal
from specauf.errors import UserError
from tests.builder.conftest import Make, refuse_to_repair, tree, write_jsonl


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "corpus.jsonl", [{"prompt": f"question number {i}"} for i in range(24)])


def sealed_in(cache: Path, name: str) -> None:
    """The manifest that a build writes which takes a damaged note for a whole one."""
    manifest = open_cache(str(cache)).manifest
    notes = manifest.notes | {name: entry_of((cache / name).read_bytes())}
    (cache / "manifest.json").write_bytes(seal(replace(manifest, notes=notes)))


@pytest.mark.parametrize("damage", ["damaged", "missing", "sealed in"])
def test_the_identity_is_written_again_from_the_manifest(make: Make, corpus: Path, damage: str) -> None:
    cache = make(max_documents=8)
    whole = tree(cache)

    def harm() -> None:
        (cache / IDENTITY).write_bytes(b"rubbish")
        if damage == "missing":
            (cache / IDENTITY).unlink()
        if damage == "sealed in":
            sealed_in(cache, IDENTITY)
        said = "missing" if damage == "missing" else "damaged"
        assert [p.what for p in check(str(cache)).problems] == [f"identity.json is {said}"]

    harm()
    make(max_documents=8)
    assert tree(cache) == whole
    harm()
    corpus.unlink()
    verdict = repair(str(cache), "cpu")
    assert (verdict.problems, verdict.repaired) == ([], [IDENTITY])
    assert tree(cache) == whole


def test_a_damaged_identity_of_an_unfinished_cache_is_known_by_its_shards(make: Make) -> None:
    cache = make(max_documents=16)
    whole = tree(cache)
    for name in ("manifest.json", "shard-00001.json"):
        (cache / name).unlink()
    (cache / IDENTITY).write_bytes(b"rubbish")
    make(max_documents=16)
    assert tree(cache) == whole
    for name in ("manifest.json", "shard-00000.json", "shard-00001.json"):
        (cache / name).unlink()
    (cache / IDENTITY).write_bytes(b"rubbish")
    with pytest.raises(UserError, match=r"identity\.json is damaged, and no manifest\.json says .*: give another"):
        make(max_documents=16)


def test_damaged_settings_are_not_built_by_and_come_back_from_the_builds_own_command(make: Make) -> None:
    cache = make(max_documents=8)
    whole = tree(cache)
    told = whole[BUILD].replace(b'"batch_size": 8', b'"batch_size": 9')
    assert told != whole[BUILD]
    for damage in (told, b"rubbish", None):
        (cache / BUILD).unlink()
        if damage is not None:
            (cache / BUILD).write_bytes(damage)
        refuse_to_repair(cache, r"build\.json, which says how .* run the build's own command again, and then this one")
        make(max_documents=8)
        assert tree(cache) == whole
