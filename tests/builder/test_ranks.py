"""Two processes share a build as one would do it alone; a second builder is refused, a dead one's place is taken."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from cache_builder.lock import BuildLock
from specauf.cache import open_cache, verify
from specauf.cache.location import Location
from specauf.cache.reader import LOCK
from specauf.errors import UserError
from tests.builder.conftest import digests, write_jsonl


@pytest.mark.slow
def test_two_ranks_give_the_bytes_of_one(tiny_target_dir: Path, tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [{"prompt": f"question number {i}"} for i in range(40)])
    target = {"name": "tiny", "model": str(tiny_target_dir), "dtype": "float32", "taps": [1, 3, 5]}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({"target": target | {"mask_token": "<|mask|>"}}))
    for devices in (1, 2):
        command = [
            sys.executable, "-m", "cache_builder", "build", f"--config={tmp_path / 'tiny.yaml'}", f"--corpus={corpus}",
            f"--out={tmp_path / str(devices)}", "--max_length=120", "--max_new_tokens=10", "--documents_per_shard=6",
            "--k=4", "--features=sketch", "--sketch_rank=16", "--max_compression=20", "--accelerator=cpu",
            f"--devices={devices}",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr
    assert open_cache(str(tmp_path / "2")).num_shards == 7
    assert verify(open_cache(str(tmp_path / "2"))) == []
    assert digests(tmp_path / "1") == digests(tmp_path / "2")


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
