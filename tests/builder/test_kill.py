"""Builders killed at random moments of every kind of writing; the next run ends in the bytes of an unbroken one."""

import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cache_builder.config import BuildConfig
from cache_builder.writer import committed_shards
from specauf.cache import open_cache, verify
from specauf.cache.location import Location
from specauf.cache.reader import IDENTITY
from specauf.cache.schema import Identity, from_json
from specauf.errors import UserError
from tests.builder.conftest import digests, make_target, make_tokenizer, write_jsonl
from tests.builder.killing import whole_life
from tests.builder.test_build import config
from tests.processes import forked

Unbroken = tuple[dict[str, str], float]
RANDOM = random.Random(20261124)
# Kinds of objects, how many of each a build stores, and how often a builder dies at one of them.
KINDS = {
    "data": (r"\.zarr/", 46, 6),
    "commit record": (r"/shard-\d+\.json$", 2, 4),
    "manifest": (r"/manifest\.json$", 1, 4),
    "target": (r"/target/|/target\.json$", 5, 3),
    "identity": (r"/(identity|build)\.json$", 2, 2),
}
MOMENTS = ("empty", "half", "whole", "renamed")
PLANNED = [
    (kind, pattern, RANDOM.randint(1, count), MOMENTS[(i + len(kind)) % 4])
    for kind, (pattern, count, deaths) in KINDS.items()
    for i in range(deaths)
]
# The default run kills one builder in each of the three kinds that matter most.
FIRST = {kind: next(i for i, death in enumerate(PLANNED) if death[0] == kind) for kind in list(KINDS)[:3]}
TIMED = [RANDOM.uniform(0.02, 0.98) for _ in range(7)]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> BuildConfig:
    """Of a build of two shards."""
    folder = tmp_path_factory.mktemp("kill")
    make_target().save_pretrained(folder / "tiny")
    make_tokenizer().save_pretrained(folder / "tiny")
    corpus = write_jsonl(folder / "corpus.jsonl", [{"prompt": f"number {i}"} for i in range(8)])
    changes = {"max_new_tokens": 6, "documents_per_shard": 4, "features": "int8", "held_out": 0.5}
    return config(folder / "tiny", corpus, folder, **changes)


@pytest.fixture(scope="module")
def unbroken(settings: BuildConfig, tmp_path_factory: pytest.TempPathFactory) -> Unbroken:
    """Digests of every object of a build that nobody disturbed, and the seconds it took."""
    out = tmp_path_factory.mktemp("unbroken") / "cache"
    forked(len, ())  # the first one waits for what all are forked from
    started = time.monotonic()
    assert forked(whole_life, replace(settings, out=str(out))).returncode == 0
    return digests(out), time.monotonic() - started


def expect_no_half_truth(cache: Path) -> None:
    """A reader of what a killed builder left gets whole data or one line that says what is wrong."""
    try:
        found = open_cache(str(cache))
    except UserError as error:
        said = str(error)
    else:
        said = "\n".join(map(str, verify(found)))
    known = ("unfinished", "holds no manifest.json", "does not exist")
    assert not said or any(words in said for words in known)
    if (cache / IDENTITY).exists():
        who = from_json(Identity, (cache / IDENTITY).read_bytes(), IDENTITY)
        for record in committed_shards(str(cache), who).values():
            stored = Location(str(cache / f"{record.name}.zarr")).files()
            assert stored == {name: entry.bytes for name, entry in record.objects.items()}


def expect_the_same_in_the_end(settings: BuildConfig, expected: dict[str, str]) -> None:
    cache = Path(settings.out)
    expect_no_half_truth(cache)
    assert forked(whole_life, settings).returncode == 0
    assert digests(cache) == expected
    assert not list(cache.rglob("*-tmp-*")), "what killed writers left is swept away"
    assert not (cache / "builder.lock").exists()


def test_the_deaths_are_many_and_of_every_kind() -> None:
    assert len(PLANNED) + len(TIMED) >= 20
    assert {kind for kind, *_ in PLANNED} == set(KINDS)
    assert {moment for *_, moment in PLANNED} == set(MOMENTS)


@pytest.mark.parametrize(
    ("pattern", "nth", "moment"),
    [
        pytest.param(*how, id=f"{kind}-{how[1]}-{how[2]}", marks=() if i in FIRST.values() else pytest.mark.slow)
        for i, (kind, *how) in enumerate(PLANNED)
    ],
)
def test_killed_while_an_object_is_written(
    settings: BuildConfig,
    unbroken: Unbroken,
    tmp_path: Path,
    pattern: str,
    nth: int,
    moment: str,
) -> None:
    here = replace(settings, out=str(tmp_path / "cache"))
    assert forked(whole_life, here, pattern, nth, moment).returncode == -signal.SIGKILL
    expect_the_same_in_the_end(here, unbroken[0])


@pytest.mark.parametrize(
    ("pattern", "left"),
    [(r"/target/weights", "identity.json"), (r"shard-00001\.zarr/", "shard-00001.json")],
    ids=["before the ranks begin", "while they work"],
)
def test_terminated_as_by_ctrl_c(
    settings: BuildConfig, unbroken: Unbroken, tmp_path: Path, pattern: str, left: str
) -> None:
    here = replace(settings, out=str(tmp_path / "cache"))
    ended = forked(whole_life, here, pattern, 1, "whole", "SIGTERM")
    assert ended.returncode == 143
    assert ended.stderr.splitlines()[-1] == "terminated: run the same command again to go on from here"
    assert "Traceback" not in ended.stderr
    found = {path.name for path in (tmp_path / "cache").iterdir()}
    assert left in found
    assert not {"manifest.json", "builder.lock"} & found
    expect_the_same_in_the_end(here, unbroken[0])


@pytest.mark.slow
def test_killed_again_and_again_at_random_times(settings: BuildConfig, unbroken: Unbroken, tmp_path: Path) -> None:
    here = replace(settings, out=str(tmp_path / "cache"))
    for share in TIMED:
        seconds = share * unbroken[1]
        while (ended := forked(whole_life, here, seconds=seconds).returncode) == 0:
            # It went on from what was there and was done too soon to be killed.
            shutil.rmtree(tmp_path / "cache")
            seconds /= 2
        assert ended == -signal.SIGKILL
        expect_no_half_truth(tmp_path / "cache")
    expect_the_same_in_the_end(here, unbroken[0])
