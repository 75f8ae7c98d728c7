"""Two processes share a build as one would do it alone; a second builder is refused, a dead one's place is taken."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

import cache_builder.lock
from cache_builder.builder import Build
from cache_builder.driver import _ShardModule, build
from cache_builder.lock import STALE_SECONDS, BuildLock, LockLostError, RankLock
from specauf.cache import open_cache, verify
from specauf.cache.location import Location
from specauf.cache.reader import LOCK
from specauf.errors import UserError
from tests.builder.conftest import digests, write_jsonl
from tests.builder.test_build import config


def on_ranks(tiny_target_dir: Path, folder: Path, documents: int) -> list[str]:
    """The command of a build without `out` and `devices`."""
    corpus = write_jsonl(folder / "corpus.jsonl", [{"prompt": f"question number {i}"} for i in range(documents)])
    target = {"name": "tiny", "model": str(tiny_target_dir), "dtype": "float32", "taps": [1, 3, 5]}
    (folder / "tiny.yaml").write_text(yaml.safe_dump({"target": target | {"mask_token": "<|mask|>"}}))
    return [
        sys.executable, "-m", "cache_builder", "build", f"--config={folder / 'tiny.yaml'}", f"--corpus={corpus}",
        "--max_length=120", "--max_new_tokens=10", "--documents_per_shard=6", "--k=4", "--features=sketch",
        "--sketch_rank=16", "--max_compression=20", "--accelerator=cpu",
    ]  # fmt: skip


@pytest.mark.slow
def test_two_ranks_give_the_bytes_of_one(tiny_target_dir: Path, tmp_path: Path) -> None:
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # products of two threads differ in their last bits on some CPUs
    for devices in (1, 2):
        command = [*on_ranks(tiny_target_dir, tmp_path, 40), f"--out={tmp_path / str(devices)}", f"--devices={devices}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=one_thread)
        assert done.returncode == 0, done.stderr
        shown = [int(n) for n in re.findall(r"build: (\d+)/40", done.stderr)]  # after a few seconds only
        assert max(shown, default=0) <= 40
        assert len(shown) == len(set(shown))
    assert open_cache(str(tmp_path / "2")).num_shards == 7
    assert verify(open_cache(str(tmp_path / "2"))) == []
    assert digests(tmp_path / "1") == digests(tmp_path / "2")


@pytest.mark.slow
def test_two_ranks_finish_a_cache_of_which_one_shard_is_missing(tiny_target_dir: Path, tmp_path: Path) -> None:
    command = [*on_ranks(tiny_target_dir, tmp_path, 12), f"--out={tmp_path / 'cache'}", "--devices=2"]
    whole: dict[str, str] = {}
    for _ in range(2):  # of two shards, the first rank makes the first one alone
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr
        whole = whole or digests(tmp_path / "cache")
        assert digests(tmp_path / "cache") == whole
        for name in ("manifest.json", "shard-00000.json"):
            (tmp_path / "cache" / name).unlink()


@pytest.mark.parametrize("rank", [0, 1])
def test_what_every_rank_would_say_is_said_once(
    tiny_target_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, rank: int
) -> None:
    def loud(*args: Any, **kwargs: Any) -> None:
        print("read corpus: 1/9 documents", file=sys.stderr)
        raise UserError("no more of it")

    monkeypatch.setattr("cache_builder.driver.rank_zero_only", SimpleNamespace(rank=rank))
    monkeypatch.setattr("cache_builder.driver.open_build", loud)
    with pytest.raises(UserError, match="no more of it"):
        build(config(tiny_target_dir, tmp_path / "corpus.jsonl", tmp_path / "cache"))
    assert ("read corpus" in capsys.readouterr().err) == (rank == 0)


@pytest.mark.parametrize("where", ["local", "memory"])
def test_a_second_builder_is_refused_while_the_first_lives(tmp_path: Path, where: str, monkeypatch) -> None:
    monkeypatch.setattr("cache_builder.lock.time.sleep", lambda seconds: None)
    place = Location(str(tmp_path / "cache") if where == "local" else f"memory://{tmp_path.name}-lock")
    with BuildLock(place):
        with pytest.raises(UserError, match=f"is being built by process {os.getpid()}"), BuildLock(place):
            pass
        assert LOCK in place.files()
    assert LOCK not in place.files()


@pytest.mark.parametrize(
    "change",
    [{"pid": 2**22 + 1}, {"born": 1}, {"host": "elsewhere/boot", "beat": 0.0}, None],
    ids=["ended", "pid reused", "silent for long", "cut short"],
)
def test_a_dead_builders_place_is_taken(tmp_path: Path, change: dict[str, object] | None) -> None:
    place = Location(str(tmp_path / "cache"))
    dead = asdict(replace(BuildLock(place).me, token="dead"))
    place.write(LOCK, b'{"token": "de' if change is None else json.dumps(dead | change).encode())
    with BuildLock(place) as lock:
        assert json.loads(place.read(LOCK))["token"] == lock.me.token
        lock.check()
    assert place.files() == {}


def test_a_builder_elsewhere_that_still_beats_is_alive(tmp_path: Path) -> None:
    place = Location(str(tmp_path / "cache"))
    other = asdict(replace(BuildLock(place).me, token="other")) | {"host": "elsewhere/boot"}
    place.write(LOCK, json.dumps(other).encode())
    with pytest.raises(UserError, match="on elsewhere: wait for it"), BuildLock(place):
        pass


def test_a_directory_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with (
        pytest.raises(UserError, match="cannot write builder") as caught,
        BuildLock(Location(str(tmp_path / "file" / "cache"))),
    ):
        pass
    assert "\n" not in str(caught.value)


class Beats:
    """Stands in for the event that the heartbeat waits for: before each beat something happens, then the end comes."""

    def __init__(self, *happens: Callable[[], object]) -> None:
        self.happens = iter(happens)

    def wait(self, seconds: float) -> bool:
        happens = next(self.happens, None)
        if happens is not None:
            happens()
        return happens is None


def beat_of(place: Location) -> float:
    return float(json.loads(place.read(LOCK))["beat"])


def take_over(place: Location) -> None:
    other = asdict(replace(BuildLock(place).me, token="other", host="elsewhere/boot"))
    place.write(LOCK, json.dumps(other).encode())


@pytest.mark.parametrize("trouble", [UserError("503 Slow Down"), OSError("stale file handle")])
@pytest.mark.parametrize("method", ["read", "write"])
def test_a_hiccup_of_the_store_does_not_end_the_heartbeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: Exception, method: str
) -> None:
    place = Location(f"memory://{tmp_path.name}-beat")
    lock = BuildLock(place)
    place.write(LOCK, json.dumps(asdict(lock.me) | {"beat": 0.0}).encode())

    def fail(*args: Any) -> bytes:
        raise trouble

    def succeed() -> None:
        monkeypatch.undo()
        assert beat_of(place) == 0.0

    def taken() -> None:
        assert beat_of(place) > 0.0
        lock.check()
        take_over(place)

    lock._done = Beats(lambda: monkeypatch.setattr(Location, method, fail), succeed, taken)  # type: ignore[assignment]
    lock._keep_alive()
    with pytest.raises(LockLostError, match="another builder took this cache over"):
        lock.check()


def test_after_a_long_silence_the_lock_itself_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Location(str(tmp_path / "cache"))
    with BuildLock(place) as lock:
        take_over(place)
        lock.check()  # the next beat would tell
        monkeypatch.setattr(cache_builder.lock.time, "monotonic", lambda: lock._heard + STALE_SECONDS + 1)
        with pytest.raises(LockLostError, match="another builder took this cache over"):
            lock.check()
        place.write(LOCK, json.dumps(asdict(lock.me)).encode())
        lock.check()
        place.remove(LOCK)
        with pytest.raises(LockLostError, match=r"builder\.lock is gone: run the same command again"):
            lock.check()


def test_other_ranks_stop_when_the_lock_is_anothers_or_the_first_rank_is_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Location(str(tmp_path / "cache"))
    with BuildLock(place) as first:
        monkeypatch.setattr(os, "getppid", lambda: first.me.pid)
        child = RankLock(place, first.me)
        monkeypatch.setattr(os, "getppid", lambda: 1)
        elsewhere = RankLock(place, first.me)
        for there in (elsewhere.check, elsewhere.confirm):
            there()
        for here in (child.check, child.confirm):
            with pytest.raises(LockLostError, match="the first rank has ended: run the same command again"):
                here()
        take_over(place)
        with pytest.raises(LockLostError, match="another builder took this cache over"):
            elsewhere.confirm()


def test_a_file_that_is_lost_while_it_is_read_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Location(str(tmp_path / "cache"))
    read, failures = Location.read, [OSError("stale file handle")]

    def lost(self: Location, name: str) -> bytes:
        if failures:
            raise failures.pop()
        return read(self, name)

    with BuildLock(place) as lock:
        monkeypatch.setattr(Location, "read", lost)
        lock.confirm()
    assert not failures


@pytest.mark.parametrize("moment", ["make", "write"])
def test_nothing_is_replaced_under_the_lock_of_another(
    tiny_target_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [{"prompt": f"question number {i}"} for i in range(12)])
    place = Location(str(tmp_path / "cache"))
    work, theirs = getattr(Build, moment), b"committed by the builder that took over"

    def overtaken(self: Build, number: int, *rest: Any) -> Any:
        if number == 1:
            take_over(place)
            place.write("shard-00001.json", theirs)
        return work(self, number, *rest)

    monkeypatch.setattr(Build, moment, overtaken)
    with pytest.raises(LockLostError, match="another builder took this cache over"):
        build(config(tiny_target_dir, corpus, tmp_path / "cache", documents_per_shard=4))
    assert place.read("shard-00001.json") == theirs
    assert json.loads(place.read(LOCK))["token"] == "other"


def test_only_the_first_rank_asks_which_shards_are_missing(
    tiny_target_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [{"prompt": f"question number {i}"} for i in range(12)])
    asked: list[int] = []
    missing = Build.missing

    def ask(self: Build) -> list[int]:
        found = missing(self)
        asked.append(len(found))
        return found

    monkeypatch.setattr(Build, "missing", ask)
    settings = config(tiny_target_dir, corpus, tmp_path / "cache", documents_per_shard=4)
    build(settings)
    assert asked[-1] == 2  # the first shard is made with the fit
    asked.clear()
    build(settings)
    assert asked == [0]
    # Another rank takes what the first one says.
    told = SimpleNamespace(broadcast=lambda mine, src: ([3, 4, 5], BuildLock(Location(settings.out)).me))
    other: Any = SimpleNamespace(
        _first=None,
        lock=None,
        work=SimpleNamespace(config=settings),
        trainer=SimpleNamespace(strategy=told, global_rank=1, world_size=2),
    )
    assert list(_ShardModule.predict_dataloader(other)) == [4]
    assert isinstance(other.lock, RankLock)


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_the_others_end_when_the_first_rank_is_killed(tiny_target_dir: Path, tmp_path: Path) -> None:
    command = [*on_ranks(tiny_target_dir, tmp_path, 4000), f"--out={tmp_path / 'cache'}", "--devices=2"]
    with (tmp_path / "said").open("w") as said:
        first = subprocess.Popen(command, stderr=said)
        for _ in range(1200):
            if (tmp_path / "cache" / "shard-00002.json").exists() or first.poll() is not None:
                break
            time.sleep(0.1)
        ranks = [p for p in children_of(first.pid) if b"cache_builder" in Path(f"/proc/{p}/cmdline").read_bytes()]
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert len(ranks) == 1
    for _ in range(600):
        if cache_builder.lock._born(ranks[0]) == 0:
            break
        time.sleep(0.1)
    assert cache_builder.lock._born(ranks[0]) == 0, "the other rank still works"
    text = (tmp_path / "said").read_text()
    assert "error: " in text
    assert "the first rank has ended: run the same command again" in text
    assert "Traceback" not in text
