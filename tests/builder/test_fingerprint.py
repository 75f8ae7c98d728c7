"""Weights on disk are told from others wherever they differ, and caches from before that go on."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import specauf.fingerprint
import specauf.targets
from cache_builder.config import BUILD
from cache_builder.driver import build
from cache_builder.repair import repair
from specauf.cache import open_cache
from specauf.errors import UserError
from specauf.fingerprint import CHECKSUM, CODE, comparable, weights_on_disk
from specauf.targets import TargetConfig, target_identity
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

    def ends_only(*place: Any, **_: Any) -> dict[str, str]:
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


def test_code_that_runs_is_told_from_other_code(tiny_target_dir: Path) -> None:
    plain = TargetConfig("tiny", model=str(tiny_target_dir))
    trusting = replace(plain, trust_remote_code=True)
    before = target_identity(plain)
    assert target_identity(trusting) == before, "there is none"
    for name, text in (("modeling.py", "a = 1"), ("modeling.py", "a = 2"), ("other.py", "")):
        (tiny_target_dir / name).write_text(text)
        assert target_identity(plain) == before, "it is not run"
    codes = [target_identity(trusting)]
    (tiny_target_dir / "modeling.py").write_text("a = 3")
    codes.append(target_identity(trusting))
    assert codes[0] != codes[1]
    assert all({**found, CODE: ""} == {**before, CODE: ""} for found in codes)


def test_a_build_with_code_that_was_changed_is_refused_and_early_caches_go_on(
    make: Make, early: Any, tiny_target_dir: Path, corpus: Path
) -> None:
    modeling = tiny_target_dir / "modeling_tiny.py"
    modeling.write_text("scale = 1\n")
    cache = make()
    whole = digests(cache)
    early.undo()
    assert CODE not in open_cache(str(cache)).manifest.identity.target

    def build_here(out: Path) -> None:
        told = config(tiny_target_dir, corpus, out, documents_per_shard=8, features="sketch", sketch_rank=8)
        build(replace(told, target=replace(told.target, trust_remote_code=True)))

    (cache / "manifest.json").unlink()
    build_here(cache)
    assert {name for name, digest in digests(cache).items() if whole[name] != digest} == {BUILD, "manifest.json"}
    new = cache.parent / "new"
    build_here(new)
    modeling.write_text("scale = 2\n")
    for name in ("manifest.json", "shard-00001.json"):
        (new / name).unlink()
    with pytest.raises(UserError, match=r"target\.code is '\w+', this build has '\w+': give another --out"):
        build_here(new)


def test_targets_are_compared_by_what_both_have() -> None:
    new, old = {"id": "a", "fingerprint": "f", CHECKSUM: "c"}, {"id": "a", "fingerprint": "f"}
    assert comparable(new, old) == comparable(old, new) == (old, old)
    assert comparable(new | {CODE: "x"}, new) == (new, new)
    assert comparable(old | {CODE: "x"}, new) == (old, old)
    assert comparable(new, new | {CHECKSUM: "d"}) == (new, new | {CHECKSUM: "d"})
