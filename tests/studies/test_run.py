"""A whole study on a tiny target: run, killed halfway by a lost result, run again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from studies.plan import FOLDER
from tests.builder.conftest import make_target, make_tokenizer, write_jsonl

pytestmark = pytest.mark.slow


def study(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(FOLDER.parent), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "studies", "tiny.yaml", "--results=results", *options],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_study_trains_decodes_and_does_nothing_twice(tmp_path: Path) -> None:
    make_target().save_pretrained(tmp_path / "target")
    make_tokenizer().save_pretrained(tmp_path / "target")
    texts = [("count to " + str(i), "one two three four five six seven eight " * 2) for i in range(24)]
    write_jsonl(tmp_path / "corpus.jsonl", [{"prompt": p, "response": r} for p, r in texts])
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": p} for p, _ in texts[:4]])
    target = {
        "name": "tiny",
        "model": str(tmp_path / "target"),
        "dtype": "float32",
        "taps": [1, 3, 5],
        "mask_token": "<|mask|>",
    }
    (tmp_path / "target.yaml").write_text(yaml.safe_dump({"target": target}))
    options = ["--config=target.yaml", "--corpus=corpus.jsonl", "--regenerate=false", "--k=4", "--features=int8"]
    options += ["--held_out=0.2"]
    raw = {
        "target": "target.yaml",
        "caches": {
            "whole": {"out": "caches/whole", "options": options},
            "tiny": {"out": "caches/tiny", "source": "whole", "options": ["--k=2"]},
        },
        "common": ["--trainer.max_epochs=1", "--data.batch_size=4"],
        "groups": [
            {"name": "g", "cache": "tiny", "losses": ["decay"], "seeds": [0]},
            {"name": "g", "cache": "tiny", "losses": ["auf"], "seeds": [0]},
        ],
        "decoding": {"benchmarks": ["prompts.jsonl"], "limit": 4, "max_new_tokens": 12, "batch_size": 3},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
    first = study(tmp_path)
    assert first.returncode == 0, first.stderr
    kept = tmp_path / "results" / "tiny" / "g-auf-0.json"
    record = json.loads(kept.read_text())
    assert record["benchmarks"]["prompts"]["identical"] == 4
    assert record["decoding"]["benchmarks"] == ["prompts"]
    assert str(tmp_path) not in kept.read_text()
    assert record["training"]["tau"] >= 1
    assert "| auf | 1 |" in first.stdout
    before = kept.stat().st_mtime_ns
    (tmp_path / "results" / "tiny" / "g-decay-0.json").unlink()
    again = study(tmp_path, "--jobs=2")
    assert again.returncode == 0, again.stderr
    assert kept.stat().st_mtime_ns == before
    assert (tmp_path / "results" / "tiny" / "g-decay-0.json").is_file()
    assert again.stdout.splitlines()[-1] == first.stdout.splitlines()[-1]
