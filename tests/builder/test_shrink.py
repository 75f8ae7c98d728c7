"""A shrunk cache holds what a build of its size would have stored."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from safetensors.numpy import load, save

from cache_builder.cli import main
from cache_builder.driver import build
from cache_builder.shrink import shrink, smaller_arrays
from cache_builder.writer import StorageSpec, write_arrays
from specauf.cache import Cache, open_cache, verify
from specauf.cache.location import TEMPORARY
from specauf.errors import UserError
from tests.builder.conftest import digests, make_target, make_tokenizer, write_jsonl
from tests.builder.test_build import config

Built = Callable[..., Cache]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Builds a cache with some settings, each once, for nobody writes into it; returns it open."""
    folder = tmp_path_factory.mktemp("built")
    make_target().save_pretrained(folder / "target")
    make_tokenizer().save_pretrained(folder / "target")
    rows = [{"prompt": f"question number {i} " + "x" * (i % 7)} for i in range(40)]
    corpus = write_jsonl(folder / "corpus.jsonl", rows)

    @functools.cache
    def made(**changes: Any) -> Cache:
        out = folder / "-".join(["cache", *(f"{name}={value}" for name, value in changes.items())])
        build(config(folder / "target", corpus, out, **changes))
        return open_cache(str(out))

    return made


def arrays(cache: Cache) -> dict[str, np.ndarray]:
    shards = [cache.shard(n).arrays for n in range(cache.num_shards)]
    return {f"{n}/{name}": array for n, shard in enumerate(shards) for name, array in shard.items()}


@pytest.fixture
def small(tmp_path: Path) -> Built:
    """Shrinks a cache to `small`; returns it open, verified."""

    def made(source: Cache, **changes: Any) -> Cache:
        out = str(tmp_path / "small")
        shrink(source.url, out, **changes)
        found = open_cache(out)
        assert verify(found) == []
        return found

    return made


@pytest.mark.parametrize(
    "changes", [{"features": "sketch", "sketch_rank": 6}, {"features": "int8"}, {"features": "none"}]
)
def test_features_come_out_as_a_build_stores_them(built: Built, small: Built, changes: dict[str, Any]) -> None:
    found, expected = small(built(), **changes), built(**changes)
    np.testing.assert_equal(arrays(found), arrays(expected))
    for name in ("channel_scale", "basis"):
        np.testing.assert_array_equal(getattr(found.codec, name), getattr(expected.codec, name))
    assert found.manifest.counts == expected.manifest.counts
    assert found.manifest.drops == expected.manifest.drops


def test_log_probabilities_are_those_of_a_build_with_fewer(built: Built, small: Built) -> None:
    found, expected = small(built(), k=2), built(k=2)
    mine, theirs = arrays(found), arrays(expected)
    assert mine.keys() == theirs.keys()
    for name in mine:
        if name.endswith("/head_mass"):  # summed over stored log-probabilities, which are rounded
            np.testing.assert_allclose(mine[name], theirs[name], atol=4)
        else:
            np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)


def test_a_smaller_sketch_is_the_first_columns(built: Built, small: Built) -> None:
    large = built(features="sketch", sketch_rank=8)
    found = small(large, sketch_rank=3)
    assert large.codec.basis is not None
    np.testing.assert_array_equal(found.codec.basis, large.codec.basis[:, :3])
    for mine, theirs in zip(found.documents(), large.documents(), strict=True):
        assert theirs.sketch is not None
        step = np.abs(theirs.sketch[:, :3]).max(1, keepdims=True) / 127
        assert (np.abs(mine.sketch - theirs.sketch[:, :3]) < step * 0.51 + 1e-6).all()


def test_the_same_sizes_give_the_same_arrays(built: Built, small: Built) -> None:
    large = built(features="sketch", sketch_rank=8)
    found = small(large)
    np.testing.assert_equal(arrays(found), arrays(large))
    assert found.manifest.identity.corpus["shrunk_from"] == large.fingerprint
    assert found.manifest.identity != large.manifest.identity


def test_a_killed_run_goes_on(built: Built, small: Built, tmp_path: Path) -> None:
    found = small(built(), k=2, features="int8")
    before = digests(tmp_path / "small")
    (tmp_path / "small" / "manifest.json").unlink()
    (tmp_path / "small" / "shard-00001.json").unlink()
    (tmp_path / f"small/shard-00001.json{TEMPORARY}7").write_bytes(b"half")
    shrink(built().url, found.url, k=2, features="int8")
    assert digests(tmp_path / "small") == before
    assert not list((tmp_path / "small").rglob(f"*{TEMPORARY}*"))


@pytest.mark.parametrize("left", ["other signs", "nothing", "the fit"])
def test_shards_of_another_fit_are_made_again(built: Built, small: Built, tmp_path: Path, left: str) -> None:
    found = small(built(), features="sketch", sketch_rank=4)
    before, folder = digests(tmp_path / "small"), tmp_path / "small"
    expected = arrays(found)
    fit = folder / "target/features.safetensors"
    if left == "nothing":
        fit.unlink()
    elif left == "other signs":  # as another machine's eigenvectors would have them
        held = load(fit.read_bytes())
        fit.write_bytes(save(held | {"basis": -held["basis"]}))
        for n in range(found.num_shards):
            stored = expected | {f"{n}/sketch": -expected[f"{n}/sketch"]}
            mine = {name.partition("/")[2]: array for name, array in stored.items() if name.startswith(f"{n}/")}
            write_arrays(str(folder), n, mine, StorageSpec(found.manifest.identity, found.codec), 0)
    (folder / "target.json").unlink()
    with mock.patch("cache_builder.shrink.smaller_arrays", wraps=smaller_arrays) as made:
        shrink(built().url, found.url, features="sketch", sketch_rank=4)
    assert made.call_count == (0 if left == "the fit" else found.num_shards)
    assert digests(folder) == before


def test_a_damaged_one_is_not_repaired_by_a_build_it_never_had(
    built: Built, small: Built, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small(built(), k=2)
    (tmp_path / "small/shard-00001.zarr/tokens/c/0").write_bytes(b"x")
    assert main(["verify", str(tmp_path / "small"), "--repair"]) == 2
    assert "shard-00001.json" in capsys.readouterr().err


@pytest.mark.parametrize("inside", ["smaller", "shard-00000.zarr/smaller"])
def test_a_cache_inside_another_is_refused(built: Built, tmp_path: Path, inside: str) -> None:
    large = Path(built(max_documents=2).url)
    before = digests(large)
    (tmp_path / "link").symlink_to(large)
    for out in (large / inside, tmp_path / "link" / inside):
        with pytest.raises(UserError, match=rf"{out} lies inside the cache {large}: give another --out"):
            shrink(str(large), str(out), k=2)
        with pytest.raises(UserError, match="lies inside the cache"):
            build(config(large.parent / "target", large.parent / "corpus.jsonl", out))
    assert digests(large) == before
    assert not (large / inside).exists()


def test_what_lies_above_may_be_anything(built: Built, tmp_path: Path) -> None:
    large = built(max_documents=2)
    (tmp_path / "above/manifest.json").mkdir(parents=True)
    shrink(large.url, str(tmp_path / "above/small"), k=2)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/manifest.json").write_text('{"name": "an app"}')
    shrink(large.url, str(tmp_path / "other/small"), k=2)


def test_a_remote_cache_inside_another_is_refused(built: Built, tmp_path: Path) -> None:
    large = built(max_documents=2)
    url = f"memory://{tmp_path.name}"
    shrink(large.url, f"{url}/small/er", k=2)
    with pytest.raises(UserError, match=rf"lies inside the cache {url}/small/er: give another --out"):
        shrink(f"{url}/small/er", f"{url}/small/er/and/smaller", k=1)
    shrink(f"{url}/small/er", f"{url}/small/est", k=1)


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_that_compresses_otherwise_is_not_a_repetition(
    built: Built, small: Built, tmp_path: Path, *, finished: bool
) -> None:
    found = small(built(), k=2)
    if not finished:
        (tmp_path / "small/manifest.json").unlink()
        (tmp_path / "small/shard-00001.json").unlink()
    before = digests(tmp_path / "small")
    for _ in range(2):
        with pytest.raises(UserError, match=r"compress_features: False in .*small holds, True now: give the same, or"):
            shrink(built().url, found.url, k=2, compress_features=True)
    assert digests(tmp_path / "small") == before
    shrink(built().url, found.url, k=2, compress_features=False)
    none = str(tmp_path / "none")
    for compress in (False, True):  # nothing there to compress
        shrink(built().url, none, features="none", compress_features=compress)


@pytest.mark.parametrize(
    ("made", "asked", "message"),
    [
        ({}, {"k": 5}, "k: 5 asked for, .* has 4: give 1 to 4"),
        ({"features": "int8"}, {"features": "bf16"}, "features: bf16 asked for, .* has int8"),
        ({"features": "none"}, {"features": "sketch"}, "features: sketch asked for, .* has none"),
        ({}, {"sketch_rank": 3}, "sketch_rank: 3 given with features bf16"),
        ({"features": "sketch", "sketch_rank": 8}, {"sketch_rank": 9}, "sketch_rank: 9 asked for, .* allows 1 to 8"),
    ],
)
def test_what_the_source_does_not_hold_is_refused(
    built: Built, small: Built, tmp_path: Path, made: Any, asked: Any, message: str
) -> None:
    large = built(**made)
    with pytest.raises(UserError, match=message):
        small(large, **asked)
    assert not (tmp_path / "small").exists()


def test_another_cache_is_not_overwritten(built: Built) -> None:
    large = built()
    with pytest.raises(UserError, match="holds a cache whose"):
        shrink(large.url, large.url, k=2)
    assert verify(open_cache(large.url)) == []


def test_the_command(
    built: Built, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    large, out = built(), str(tmp_path / "small")
    assert main(["shrink", large.url, "--out", out, "--features=sketch", "--sketch-rank=5", "--k=1"]) == 0
    assert "40 documents" in capsys.readouterr().out
    identity = open_cache(out).manifest.identity
    assert (identity.k, identity.features, identity.sketch_rank) == (1, "sketch", 5)
    assert main(["shrink", large.url, "--out", str(Path(large.url, "manifest.json"))]) == 2
    assert "is a file" in capsys.readouterr().err
    assert main(["shrink", large.url]) == 2
    assert "give --out" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path / "small")  # where an empty path would point
    for command in (["shrink", large.url], ["build", "--config=smollm2-135m", f"--corpus={tmp_path}/corpus.jsonl"]):
        assert main([*command, "--out="]) == 2
        assert "out is empty, expected a directory for the cache: give --out" in capsys.readouterr().err
