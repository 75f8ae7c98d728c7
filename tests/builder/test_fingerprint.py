"""Weights on disk are told from others wherever they differ, and caches from before that go on."""

from pathlib import Path
from typing import Any

import pytest

import specauf.fingerprint
import specauf.targets
from cache_builder.driver import build
from cache_builder.repair import repair
from specauf.cache import open_cache
from specauf.errors import UserError
from specauf.fingerprint import CHECKSUM, comparable, weights_on_disk
from tests.builder.conftest import Make, digests, write_jsonl
from tests.builder.test_build import config

WEIGHTS = "model.safetensors"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "corpus.jsonl", [{"prompt": f"question number {i}"} for i in range(24)])


@pytest.fixture
def middle(monkeypatch: pytest.MonkeyPatch, tiny_target_dir: Path) -> Any:
    """Changes one byte of the target's weights that lies in neither end."""
    monkeypatch.setattr(specauf.fingerprint, "END_BYTES", 256)

    def change() -> None:
        path = tiny_target_dir / WEIGHTS
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    return change


@pytest.fixture
def early(monkeypatch: pytest.MonkeyPatch) -> Any:
    """As a release did that knew both ends only."""

    def ends_only(*place: Any) -> dict[str, str]:
        return {"fingerprint": weights_on_disk(*place)["fingerprint"]}

    with monkeypatch.context() as before:
        before.setattr(specauf.targets, "weights_on_disk", ends_only)
        yield before


@pytest.mark.parametrize("at", [0, 1 << 20, 3 << 19, (3 << 20) - 1])
def test_one_byte_anywhere_is_seen(tmp_path: Path, at: int) -> None:
    data = bytearray(3 << 20)
    (tmp_path / WEIGHTS).write_bytes(data)
    before = weights_on_disk(tmp_path, None)
    data[at] = 1
    (tmp_path / WEIGHTS).write_bytes(data)
    after = weights_on_disk(tmp_path, None)
    assert before[CHECKSUM] != after[CHECKSUM]
    assert (before["fingerprint"] == after["fingerprint"]) == (at in (1 << 20, 3 << 19)), "early caches keep theirs"


def test_a_build_and_a_repair_with_weights_changed_in_the_middle_are_refused(
    make: Make, middle: Any, tiny_target_dir: Path, corpus: Path
) -> None:
    cache = make()
    (cache / "shard-00001.json").unlink()
    middle()
    with pytest.raises(UserError, match=r"target\.checksum is"):
        repair(str(cache), "cpu")
    (cache / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"holds a cache whose target\.checksum is '\w+', this build has '\w+': give"):
        build(config(tiny_target_dir, corpus, cache, documents_per_shard=8, features="sketch", sketch_rank=8))


def test_a_cache_without_checksum_goes_on_and_is_repaired(make: Make, early: Any) -> None:
    cache = make()
    whole = digests(cache)
    early.undo()
    assert CHECKSUM not in open_cache(str(cache)).manifest.identity.target
    (cache / "shard-00001.json").unlink()
    assert repair(str(cache), "cpu").problems == []
    (cache / "shard-00002.json").unlink()
    (cache / "manifest.json").unlink()
    make()
    assert digests(cache) == whole


def test_targets_are_compared_by_what_both_have() -> None:
    new, old = {"id": "a", "fingerprint": "f", CHECKSUM: "c"}, {"id": "a", "fingerprint": "f"}
    assert comparable(new, old) == comparable(old, new) == (old, old)
    assert comparable(new, new | {CHECKSUM: "d"}) == (new, new | {CHECKSUM: "d"})
