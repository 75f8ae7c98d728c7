"""What an estimate multiplies by the documents, and what it does not; the clock is one that the test moves."""

from pathlib import Path
from typing import Any

import pytest
import torch

from cache_builder.builder import Build
from cache_builder.cli import main
from cache_builder.documents import DocumentMaker
from cache_builder.estimate import estimate
from tests.builder.conftest import write_jsonl
from tests.builder.test_build import config

# Seconds of each part.
ADVANCE = {"make": 2.0, "fit": 100.0, "write_target": 50.0, "write_shard": 1.0}  # make and write_shard: for a document


class Clock:
    """Moves only when a part of the build is done."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def slow(self, patch: pytest.MonkeyPatch, owner: Any, name: str, documents: int | None) -> None:
        """Let a function take its time: for each document of that argument, where one is named."""
        done = getattr(owner, name)

        def slowly(*args: Any, **kwargs: Any) -> Any:
            self.now += ADVANCE[name] * (1 if documents is None else len(args[documents]))
            return done(*args, **kwargs)

        patch.setattr(owner, name, slowly)


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_is_paid_once_is_not_multiplied(
    tiny_target_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    import cache_builder.estimate as module

    clock = Clock()
    for owner, name, documents in (
        (DocumentMaker, "make", 1), (Build, "fit", None), (module, "write_target", None), (module, "write_shard", 2),
    ):  # fmt: skip
        clock.slow(monkeypatch, owner, name, documents)
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [{"prompt": f"question number {i}"} for i in range(24)])
    settings = config(tiny_target_dir, corpus, tmp_path / "cache", features="int8", devices=ranks, min_answer_tokens=1)
    for sample in (4, 12):
        found = estimate(settings, sample, clock)
        assert found.kept == 1.0
        assert found.once_seconds == 150.0
        assert found.seconds == 24 * 3.0 / ranks + 150.0
        assert found.tokens_per_second == pytest.approx(found.tokens / (24 * 3.0))
    assert "2 min 30 s of it paid once" in found.text()


def test_an_estimate_of_too_few_tokens_asks_for_a_larger_sample(
    tiny_target_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "corpus.jsonl").write_text('{"prompt": "why?"}\n')
    words = [
        "estimate", f"--target.model={tiny_target_dir}", "--target.name=tiny", "--target.dtype=float32",
        "--target.taps=[1, 3, 5]", "--target.mask_token=<|mask|>", f"--corpus={tmp_path / 'corpus.jsonl'}",
        "--accelerator=cpu", "--max_length=120", "--max_new_tokens=10", "--sketch_rank=96", "--k=4",
        "--min_answer_tokens=1", "--max_compression=20",
    ]  # fmt: skip
    assert main(words) == 2
    assert "lower --sketch_rank, or raise --sample" in capsys.readouterr().err


def test_a_sample_is_built_with_one_ranks_share_of_the_cores(
    tiny_target_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    torch.set_num_threads(4)
    make, threads = DocumentMaker.make, []

    def counted(*args: Any) -> Any:
        threads.append(torch.get_num_threads())
        return make(*args)

    monkeypatch.setattr(DocumentMaker, "make", counted)
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [{"prompt": f"question number {i}"} for i in range(24)])
    estimate(config(tiny_target_dir, corpus, tmp_path / "cache", devices=2, min_answer_tokens=1), 4)
    assert threads == [2]
