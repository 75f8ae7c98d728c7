"""SIGTERM ends whatever the builder is at, as Ctrl-C does: in one line, and what is committed stays."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import cache_builder.driver
from cache_builder.cli import main
from cache_builder.documents import DocumentMaker
from cache_builder.driver import build
from specauf.errors import TerminatedError
from specauf.sigterm import Sigterm, sigterm_interrupts
from tests.builder.conftest import write_jsonl
from tests.builder.test_build import config

GO_ON = "terminated: run the same command again to go on from here"


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "corpus.jsonl", [{"prompt": f"question number {i}"} for i in range(24)])


def test_a_shard_in_the_making_is_left_and_those_before_stay(
    tiny_target_dir: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, made = DocumentMaker.make, []

    def stopped(self: DocumentMaker, numbers: range, advance: Callable[[int, float], object]) -> object:
        made.append(numbers[0])
        if len(made) == 3:
            terminate()
        return make(self, numbers, advance)

    monkeypatch.setattr(DocumentMaker, "make", stopped)
    with sigterm_interrupts(), pytest.raises(TerminatedError):
        build(config(tiny_target_dir, corpus, tmp_path / "cache", documents_per_shard=4))
    assert made == [0, 4, 8]
    records = sorted(path.name for path in (tmp_path / "cache").glob("shard-*.json"))
    assert records == ["shard-00000.json", "shard-00001.json"]
    assert not (tmp_path / "cache" / "builder.lock").exists()


def test_ctrl_c_between_two_shards_is_not_lightnings_to_answer(
    tiny_target_dir: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(self: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cache_builder.driver._ShardModule, "on_predict_start", stopped)
    with pytest.raises(KeyboardInterrupt):
        build(config(tiny_target_dir, corpus, tmp_path / "cache"))


def test_any_command_ends_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("cache_builder.repair.check", lambda place: terminate())
    assert main(["verify", "anywhere"]) == 143
    assert capsys.readouterr().err == GO_ON + "\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_one_does_not_end_the_tidying_up() -> None:
    tidied: list[str] = []

    def work() -> None:
        try:
            terminate()
        finally:
            terminate()
            tidied.append("all")

    with sigterm_interrupts(), pytest.raises(TerminatedError):
        work()
    assert tidied == ["all"]


def test_what_ranks_do_together_is_told_and_passes_it_on() -> None:
    passed: list[int] = []
    with sigterm_interrupts(), Sigterm(lambda: passed.append(1)) as sigterm:
        sigterm.check()
        terminate()
        terminate()
        assert sigterm.came
        with pytest.raises(TerminatedError):
            sigterm.check()
    assert passed == [1, 1]


def test_other_threads_and_a_process_that_ignores_it_keep_their_ways() -> None:
    def inside() -> None:
        with sigterm_interrupts(), Sigterm() as sigterm:
            handlers.append(signal.getsignal(signal.SIGTERM))
            sigterm.check()

    handlers = [signal.signal(signal.SIGTERM, signal.SIG_IGN)]
    try:
        inside()
        thread = threading.Thread(target=inside)
        thread.start()
        thread.join()
    finally:
        signal.signal(signal.SIGTERM, handlers[0])
    assert handlers[1:] == [signal.SIG_IGN, signal.SIG_IGN]


@pytest.mark.slow
def test_all_ranks_end_when_the_first_is_told(tiny_target_dir: Path, tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [{"prompt": f"question number {i}"} for i in range(4000)])
    target = {"name": "tiny", "model": str(tiny_target_dir), "dtype": "float32", "taps": [1, 3, 5]}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({"target": target | {"mask_token": "<|mask|>"}}))
    command = [
        sys.executable, "-m", "cache_builder", "build", f"--config={tmp_path / 'tiny.yaml'}", f"--corpus={corpus}",
        f"--out={tmp_path / 'cache'}", "--max_length=120", "--max_new_tokens=40", "--documents_per_shard=8", "--k=4",
        "--features=bf16", "--max_compression=20", "--accelerator=cpu", "--devices=2",
    ]  # fmt: skip
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for _ in range(1200):
        if (tmp_path / "cache" / "shard-00002.json").exists() or first.poll() is not None:
            break
        time.sleep(0.1)
    first.send_signal(signal.SIGTERM)
    said = first.communicate(timeout=120)[1]
    assert first.returncode == 143, said
    assert said.count(GO_ON) == 1
    assert "Traceback" not in said
    assert not (tmp_path / "cache" / "manifest.json").exists()
    assert not (tmp_path / "cache" / "builder.lock").exists()
