"""What a build or a repair may throw away: nothing before it knows that it can make it again, and nothing of others."""

import errno
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.spec import AbstractFileSystem
from safetensors.numpy import load, save

import specauf
from cache_builder.cli import main
from cache_builder.config import BUILD
from cache_builder.driver import build, require_all_done
from cache_builder.lock import BuildLock
from cache_builder.repair import check, repair
from cache_builder.shrink import shrink
from specauf.cache import open_cache, verify
from specauf.cache.location import Location, StoreError, sha256
from specauf.cache.schema import seal
from specauf.errors import TerminatedError, UserError
from tests.builder.conftest import Make, digests, refuse_to_repair, tree, write_jsonl
from tests.builder.test_build import config


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "corpus.jsonl", [{"prompt": f"question number {i}"} for i in range(24)])


def test_a_refused_build_leaves_a_directory_of_others_untouched(make: Make, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    (folder / "run.tmp-1").mkdir(parents=True)
    for name in ("report.txt", "essay.draft-2", "run.tmp-1/thesis.tmp-2024"):
        (folder / name).write_text(name)
    before = tree(folder)
    with pytest.raises(UserError, match="and no cache: give another --out"):
        make()
    assert tree(folder) == before


@pytest.mark.parametrize("victim", ["shard-00001.zarr/sketch/c/0/0", "target/weights.safetensors", "manifest.json"])
def test_a_repair_that_cannot_be_done_leaves_the_cache_as_it_was(make: Make, corpus: Path, victim: str) -> None:
    cache = make()
    data = (cache / victim).read_bytes()
    (cache / victim).write_bytes(data[:100])
    asked = corpus.read_bytes()
    corpus.unlink()
    refuse_to_repair(cache, "corpus .* does not exist")
    corpus.write_bytes(asked + b'{"prompt": "one more"}\n')
    refuse_to_repair(cache, r"corpus\.(fingerprint|documents) is")
    corpus.write_bytes(asked)
    assert repair(str(cache), "cpu").problems == []


def test_a_whole_manifest_of_another_format_is_not_thrown_away(make: Make) -> None:
    cache = make()
    raw = json.loads((cache / "manifest.json").read_text()) | {"format": 2, "checksum": ""}
    text = json.dumps(raw)
    (cache / "manifest.json").write_text(text.replace('"checksum": ""', f'"checksum": "{sha256(text.encode())}"'))
    refuse_to_repair(cache, "format is 2")


def test_strays_are_removed_and_nothing_is_built(make: Make, corpus: Path) -> None:
    cache = make()
    whole = tree(cache)
    corpus.unlink()
    for folder in ("shard-00001.zarr", "target"):
        (cache / folder / ".DS_Store").write_bytes(b"x")
    assert len(check(str(cache)).problems) == 2
    verdict = repair(str(cache), "cpu")
    assert verdict.problems == []
    assert verdict.repaired == []
    assert verdict.removed == ["shard-00001.zarr/.DS_Store", "target/.DS_Store"]
    assert "removed: shard-00001.zarr/.DS_Store, target/.DS_Store" in verdict.text()
    assert tree(cache) == whole


def test_another_release_repairs_and_goes_on(make: Make, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    cache = make()
    whole = digests(cache)
    (cache / "shard-00001.json").unlink()
    monkeypatch.setattr(specauf, "__version__", "99.1")
    assert repair(str(cache), "cpu").problems == []
    assert digests(cache) == whole
    assert "was begun by specauf" in capsys.readouterr().err
    (cache / "shard-00002.json").unlink()
    (cache / "manifest.json").unlink()
    make()
    assert digests(cache) == whole


def test_repairing_the_target_keeps_the_fit(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make()
    whole = digests(cache)
    (cache / "target/config.json").write_bytes(b"{}")
    monkeypatch.setattr("cache_builder.builder.Fitting", None)
    assert repair(str(cache), "cpu").problems == []
    assert digests(cache) == whole


def _other_signs(cache: Path) -> None:
    """A fit of the same sample, as another machine's eigenvectors would give it."""
    path = cache / "target/features.safetensors"
    arrays = load(path.read_bytes())
    path.write_bytes(save({**arrays, "basis": -arrays["basis"]}))


@pytest.mark.parametrize("record", ["there", "lost"])
def test_a_fit_that_comes_out_otherwise_makes_all_shards_again(make: Make, capsys: Any, record: str) -> None:
    """The stored fit is damaged, and the one that can be had is not what the shards were encoded with."""
    cache = make()
    whole = digests(cache)
    _other_signs(cache)
    if record == "there":  # shards and record agree on a fit that this machine does not find again
        (cache / "target/features.safetensors").write_bytes(b"damaged")
        raw = json.loads((cache / "target.json").read_text())
        raw["objects"]["features.safetensors"]["sha256"] = "0" * 64
        (cache / "target.json").write_text(json.dumps(raw))
    else:
        (cache / "target.json").unlink()
    stamps = {p: p.stat().st_mtime_ns for p in cache.rglob("shard-*.json")}
    assert repair(str(cache), "cpu").problems == []
    assert "3 shards are made again" in capsys.readouterr().err
    assert all(p.stat().st_mtime_ns != stamp for p, stamp in stamps.items())
    assert digests(cache) == whole


@pytest.mark.parametrize("moment", ["weights", "record", "between records"])
def test_a_refit_that_is_killed_never_ends_in_old_codes_under_the_new_fit(
    make: Make, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    cache = make()
    whole = digests(cache)
    _other_signs(cache)
    (cache / "target.json").unlink()
    write, remove = Location.write, Location.remove

    def killed_writing(self: Location, name: str, data: bytes) -> None:
        if name.endswith({"weights": "weights.safetensors", "record": "target.json"}.get(moment, "\0")):
            raise KeyboardInterrupt
        write(self, name, data)

    def killed_removing(self: Location, name: str) -> None:
        if moment == "between records" and name == "shard-00001.json":
            raise KeyboardInterrupt
        remove(self, name)

    with monkeypatch.context() as patched:
        patched.setattr(Location, "write", killed_writing)
        patched.setattr(Location, "remove", killed_removing)
        with pytest.raises(KeyboardInterrupt):
            repair(str(cache), "cpu")
    assert repair(str(cache), "cpu").problems == []
    assert digests(cache) == whole


def test_a_half_built_cache_is_finished_where_the_target_has_moved(
    make: Make, tiny_target_dir: Path, corpus: Path, tmp_path: Path
) -> None:
    cache = make()
    for name in ("manifest.json", "shard-00002.json"):
        (cache / name).unlink()
    moved = tmp_path / "moved"
    tiny_target_dir.rename(moved)
    build(config(moved, corpus, cache, documents_per_shard=8, features="sketch", sketch_rank=8))
    (cache / "shard-00000.json").unlink()
    assert repair(str(cache), "cpu").problems == []


def test_a_shard_of_which_nothing_is_left_does_not_end_the_build(
    tiny_target_dir: Path, tmp_path: Path, capsys: Any
) -> None:
    long = [{"prompt": "x" * 300 + str(i)} for i in range(9)]
    rows = [*long[:4], *({"prompt": f"question number {i}"} for i in range(4)), *long[4:]]
    corpus = write_jsonl(tmp_path / "corpus.jsonl", rows)
    settings: dict[str, Any] = {"documents_per_shard": 4, "features": "int8"}
    manifest = build(config(tiny_target_dir, corpus, tmp_path / "cache", **settings))
    assert manifest is not None
    assert manifest.drops == {"over_long": 9}
    assert [s.counts.documents for s in manifest.shards] == [0, 4, 0, 0]
    cache = open_cache(str(tmp_path / "cache"))
    assert verify(cache) == []
    # What is left out is not made again, and a smaller cache keeps count of it.
    whole = digests(tmp_path / "cache")
    build(config(tiny_target_dir, corpus, tmp_path / "cache", **settings))
    assert digests(tmp_path / "cache") == whole
    small = shrink(str(tmp_path / "cache"), str(tmp_path / "small"), k=2)
    assert small.drops == {"over_long": 9}
    assert verify(open_cache(str(tmp_path / "small"))) == []
    with pytest.raises(UserError, match=r"no document is left \(9 over_long\)"):
        build(config(tiny_target_dir, write_jsonl(tmp_path / "c.jsonl", long), tmp_path / "none", **settings))


def test_a_finished_cache_stays_as_it_is(make: Make) -> None:
    cache = make()
    before = tree(cache)
    make(max_documents=1000)
    assert tree(cache) == before


def test_shards_are_stored_alike(make: Make, tmp_path: Path) -> None:
    cache = make(compress_features=True)
    (cache / "shard-00002.json").unlink()
    (cache / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"compress_features: True in the build that began .*, False now"):
        make()
    make(compress_features=True)
    sizes = {}
    for name, compress in (("as it is", None), ("plain", False)):
        shrink(str(cache), str(tmp_path / name), compress_features=compress)
        sizes[name] = open_cache(str(tmp_path / name)).manifest.total_bytes
    assert sizes["as it is"] < sizes["plain"]
    assert abs(sizes["as it is"] - open_cache(str(cache)).manifest.total_bytes) < 2000  # the records name the source


def test_an_interrupted_rank_keeps_the_first_from_finishing() -> None:
    require_all_done([(None, None), (None, None)])
    for interrupted in (KeyboardInterrupt, TerminatedError):
        with pytest.raises(interrupted):
            require_all_done([(None, None), (None, interrupted)])
    with pytest.raises(UserError, match="no room"):
        require_all_done([(None, None), ("no room", None)])


def test_the_lock_holds_where_there_are_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    place = Location(str(tmp_path / "cache"))
    with BuildLock(place), pytest.raises(UserError, match="is being built by process"), BuildLock(place):
        pass
    with BuildLock(place):
        pass
    assert list((tmp_path / "cache").iterdir()) == []


class Locked(AbstractFileSystem):
    """A store that asks for credentials."""

    protocol = "locked"

    def cat_file(self, path: str, *args: Any, **kwargs: Any) -> bytes:
        raise RuntimeError("no credentials\nfound")


def test_a_store_that_does_not_answer_is_one_line() -> None:
    fsspec.register_implementation("locked", Locked, clobber=True)
    with pytest.raises(UserError, match=r"^locked://cache/manifest.json cannot be read: no credentials found; check"):
        open_cache("locked://cache")


def test_settings_that_cannot_be_read_for_a_moment_are_not_written_again(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, read = make(), Location.read
    before = tree(cache)

    def throttled(self: Location, name: str) -> bytes:
        if name == BUILD:
            raise StoreError(f"{self.url}/{name} cannot be read: 503 Slow Down")
        return read(self, name)

    with monkeypatch.context() as patched:
        patched.setattr(Location, "read", throttled)
        with pytest.raises(StoreError, match="503 Slow Down"):
            make()
    assert tree(cache) == before


def test_a_moved_cache_is_repaired_where_it_is(make: Make, tmp_path: Path) -> None:
    cache = make()
    whole = digests(cache)
    shutil.move(cache, tmp_path / "moved here")
    (tmp_path / "moved here/shard-00000.json").unlink()
    assert repair(str(tmp_path / "moved here"), "cpu").problems == []
    assert digests(tmp_path / "moved here") == whole
    assert (tmp_path / "moved here" / BUILD).exists()
    assert seal(open_cache(str(tmp_path / "moved here")).manifest)


def test_what_has_moved_is_said_where(make: Make, tiny_target_dir: Path, corpus: Path, capsys: Any) -> None:
    cache = make()
    whole = tree(cache)
    told = ["verify", str(cache), "--repair", "--accelerator=cpu"]
    target, questions = (
        tiny_target_dir.rename(tiny_target_dir.parent / "moved"),
        corpus.rename(corpus.parent / "q.jsonl"),
    )
    (cache / "shard-00001.zarr/sketch/c/0/0").write_bytes(b"")
    for words, says in (
        ([], "corpus .* does not exist"),
        ([f"--corpus={questions}"], r"--target\.model"),
        ([f"--corpus={questions}", f"--target.model={target}"], ""),
    ):
        assert main([*told, *words]) == (2 if says else 0)
        assert re.search(says, capsys.readouterr().err)
    assert tree(cache) == whole
    assert main(["verify", str(cache), "--corpus=elsewhere"]) == 2
    assert "--corpus is given, but only a repair reads it: add --repair" in capsys.readouterr().err
    with questions.open("a") as file:
        file.write('{"prompt": "one more"}\n')
    (cache / "shard-00001.zarr/sketch/c/0/0").write_bytes(b"")
    assert main([*told, f"--corpus={questions}", f"--target.model={target}"]) == 2
    assert "corpus.fingerprint is" in capsys.readouterr().err


def test_a_build_goes_on_where_target_and_corpus_lie_now(
    make: Make, tiny_target_dir: Path, corpus: Path, tmp_path: Path
) -> None:
    cache = make()
    whole = digests(cache)
    (cache / "manifest.json").unlink()
    (cache / "shard-00002.json").unlink()
    target, questions = tiny_target_dir.rename(tmp_path / "moved"), corpus.rename(tmp_path / "questions.jsonl")
    again = config(target, questions, cache, documents_per_shard=8, features="sketch", sketch_rank=8)
    build(replace(again, target=replace(again.target, name="another-name")))
    found = digests(cache)
    assert {name for name in whole if found[name] != whole[name]} <= {"build.json", "manifest.json"}
    assert open_cache(str(cache)).manifest.identity.corpus["name"] == str(corpus)
