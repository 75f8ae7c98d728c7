"""A tiny target on disk with drafters for it, and prompts: an evaluation takes a second."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from specauf.drafters import DFlashDrafter, DrafterConfig
from specauf.evaluation.record import EVALUATION
from specauf.evaluation.results import evaluation_record
from specauf.evaluation.settings import Setting
from tests.builder.conftest import make_target, make_tokenizer
from tests.training.conftest import tiny_cache  # noqa: F401


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Path:
    """`target`, drafters `one` and `two`, `prompts.jsonl`."""
    folder = tmp_path_factory.mktemp("evaluation")
    target = make_target()
    target.save_pretrained(folder / "target")
    make_tokenizer().save_pretrained(folder / "target")
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        tiny_drafter(target).save_pretrained(folder / name)
    prompts = [{"prompt": "write a loop"}, {"turns": ["say hello", "again"]}, {"prompt": "count to ten"}]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))
    return folder


def tiny_drafter(target, **changes) -> DFlashDrafter:
    settings = {"num_hidden_layers": 1, "block_size": 6, "taps": (1, 2, 3, 4, 5), "mask_token_id": 258} | changes
    return DFlashDrafter(DrafterConfig.from_target(target.config.to_dict(), **settings)).eval()


def command(place: Path, out: Path, *more: str) -> list[str]:
    """An evaluation of both drafters."""
    return [
        "evaluate",
        f"first={place}/one",
        f"second={place}/two",
        f"--target={place}/target",
        f"--benchmarks=[{place}/prompts.jsonl]",
        "--max_new_tokens=10",
        "--dtype=float32",
        f"--out={out}",
        *more,
    ]


def made_record(*settings: Setting, name: str = "mine", accepted: Sequence[Sequence[int]] = ((1, 0), (2,))) -> dict:
    """What an evaluation with one drafter writes that accepted so many drafts in the cycles of each prompt."""
    environment = {"date": "2026-11-26", "device": "CPU"}
    way = {"tokens": 9, "seconds": 1.0, "divergence": None, "identical": True}
    way |= {f"{part}_seconds": 0.25 for part in ("prefill", "draft", "verify", "other")}
    rows = [
        {
            "environment": environment,
            "benchmark": "b",
            "setting": setting.to_dict(),
            "task_id": f"b/{i}",
            "digest": "d",
            "ids": "t",
        }
        | {"plain": way, "generate": way, "drafters": {name: way | {"accepted": list(cycles)}}}
        for setting in settings or (Setting(9),)
        for i, cycles in enumerate(accepted)
    ]
    facts = {"target": "t", "identity": {}, "dtype": "float32", "drafters": {}, "training": {}}
    return json.loads(json.dumps(evaluation_record(rows, {name: 5}, None, **facts)))


def record_of(out: Path) -> dict:
    return json.loads((out / EVALUATION).read_text())
