"""A build on a disk that is really full: one line, and the same build goes on once there is room."""

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cache_builder.driver import build
from specauf.cache import open_cache, verify
from specauf.errors import UserError
from tests.builder.conftest import digests, write_jsonl
from tests.builder.test_build import config

SIZE = 1 << 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte in memory."""
    folder = tmp_path / "small"
    folder.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("no `mount` command: a full disk cannot be made here")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"a tmpfs may not be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("room", [0, 20_000, 300_000])
def test_a_full_disk_ends_in_one_line_and_the_build_goes_on(
    tiny_target_dir: Path, small_disk: Path, tmp_path: Path, room: int
) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [{"prompt": f"question number {i}"} for i in range(24)])
    changes: dict[str, Any] = {"documents_per_shard": 8}
    ballast = small_disk / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        for _ in range((SIZE - room) // 1000):
            file.write(bytes(1000))
    with pytest.raises(UserError, match=r"cannot write .*No space left on device; make room") as caught:
        build(config(tiny_target_dir, corpus, small_disk / "cache", **changes))
    assert "\n" not in str(caught.value)
    ballast.unlink()
    assert not (small_disk / "cache" / "manifest.json").exists()
    build(config(tiny_target_dir, corpus, small_disk / "cache", **changes))
    assert verify(open_cache(str(small_disk / "cache"))) == []
    build(config(tiny_target_dir, corpus, tmp_path / "roomy", **changes))
    assert digests(small_disk / "cache") == digests(tmp_path / "roomy")
