"""What does not fit together ends in one line with both values and status 2: building, and training from the cache."""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import LlamaForCausalLM

from cache_builder.cli import main as builder
from specauf.cache import open_cache
from specauf.cache.location import sha256
from specauf.cache.schema import seal
from specauf.cli import main as specauf
from specauf.drafters import DFlashDrafter, DFlashSpec
from tests.builder.conftest import CHATML, make_target, make_tokenizer, write_jsonl
from tests.training.conftest import tiny_cache, write_tiny_cache  # noqa: F401 -- a fixture
from tests.training.running import arguments


def words(folder: Path, tiny: Path, out: str, **target: Any) -> list[str]:
    """A build's command line."""
    settings = {"name": "tiny", "model": str(tiny), "dtype": "float32", "taps": [1, 3, 5], "mask_token": "<|mask|>"}
    (folder / f"{out}.yaml").write_text(yaml.safe_dump({"target": settings | target}))
    corpus = write_jsonl(folder / "corpus.jsonl", [{"prompt": f"question number {i}"} for i in range(8)])
    return [
        "build", f"--config={folder / f'{out}.yaml'}", f"--corpus={corpus}", f"--out={folder / out}",
        "--max_length=120", "--max_new_tokens=6", "--k=4", "--features=none", "--max_compression=20",
        "--accelerator=cpu",
    ]  # fmt: skip


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """What a command said before it ended: its last line, and no traceback before it."""
    error = capsys.readouterr().err
    assert "Traceback" not in error
    last = error.strip().splitlines()[-1]
    assert last.startswith("error: ")
    return last


def _tokenizer(tiny: Path) -> dict[str, Any]:
    make_tokenizer(eos="</s>").save_pretrained(tiny)
    return {}


def _template(tiny: Path) -> dict[str, Any]:
    make_tokenizer(template=CHATML.replace("assistant", "helper")).save_pretrained(tiny)
    return {}


def _vocabulary(tiny: Path) -> dict[str, Any]:
    make_target(vocab_size=300).save_pretrained(tiny)
    return {}


def _weights(tiny: Path) -> dict[str, Any]:
    make_target(seed=1).save_pretrained(tiny)
    return {}


CHANGES: dict[str, tuple[Callable[[Path], dict[str, Any]], list[str]]] = {
    "tokenizer": (_tokenizer, ["target", "tokenizer_hash"]),  # the model's directory holds the tokenizer
    "template": (_template, ["tokenizer_hash", "chat_template_hash"]),
    "template options": (lambda tiny: {"template_options": {"enable_thinking": False}}, ["chat_template_hash"]),
    "vocabulary": (_vocabulary, ["target", "vocab_size"]),
    "weights": (_weights, ["target"]),
    "taps": (lambda tiny: {"taps": [1, 3, 4]}, ["taps"]),
    "mask token": (lambda tiny: {"mask_token": "<|pad|>"}, ["mask_token_id"]),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_build_on_another_targets_cache(
    case: str, tiny_target_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert builder(words(tmp_path, tiny_target_dir, "cache")) == 0
    change, fields = CHANGES[case]
    target = change(tiny_target_dir)
    assert builder(words(tmp_path, tiny_target_dir, "other", **target)) == 0
    capsys.readouterr()
    again = words(tmp_path, tiny_target_dir, "other", **target)
    assert (
        builder([w.replace(str(tmp_path / "other"), str(tmp_path / "cache")) if "--out" in w else w for w in again])
        == 2
    )
    said = one_line(capsys)
    old, new = (asdict(open_cache(str(tmp_path / n)).manifest.identity) for n in ("cache", "other"))
    assert [name for name in old if old[name] != new[name]] == fields
    for name in fields:
        before, now = old[name], new[name]
        pairs = {name: (before, now)}
        if isinstance(before, dict):
            pairs = {f"{name}.{key}": (before[key], now[key]) for key in before if before[key] != now[key]}
        for what, (one, two) in pairs.items():
            assert f"{what} is {one!r}, this build has {two!r}" in said
    assert "give another --out" in said


def _smaller_vocabulary(folder: Path, tiny: Path) -> list[str]:
    make_target(vocab_size=200, eos_token_id=1).save_pretrained(tiny)
    return []


def _not_finite(value: float) -> Callable[[Path, Path], list[str]]:
    def break_it(folder: Path, tiny: Path) -> list[str]:
        model = LlamaForCausalLM.from_pretrained(tiny)
        with torch.no_grad():
            model.lm_head.weight[:, 3] = value
        model.save_pretrained(tiny)
        return []

    return break_it


def _broken_line(folder: Path, tiny: Path) -> list[str]:
    lines = [json.dumps({"prompt": f"question {i}"}) for i in range(9)]
    lines[6] = '{"prompt": oh}'
    (folder / "broken.jsonl").write_text("\n".join(lines))
    return [f"--corpus={folder / 'broken.jsonl'}"]


def _empty_corpus(folder: Path, tiny: Path) -> list[str]:
    (folder / "empty.jsonl").write_text("")
    return [f"--corpus={folder / 'empty.jsonl'}"]


def _blank_corpus(folder: Path, tiny: Path) -> list[str]:
    return [f"--corpus={write_jsonl(folder / 'blank.jsonl', [{'prompt': ' '}] * 3)}"]


def _file(folder: Path, tiny: Path) -> list[str]:
    (folder / "mine.txt").write_text("thesis")
    return [f"--out={folder / 'mine.txt'}"]


ENDS: dict[str, tuple[Callable[[Path, Path], list[str]], list[str]]] = {
    "k": (lambda folder, tiny: ["--k=1000"], ["k is 1000", "vocabulary has 270"]),
    "tokenizer of a larger vocabulary": (_smaller_vocabulary, ["<|mask|>", "258", "200"]),
    "tap": (lambda folder, tiny: ["--target.taps=[1,7]"], ["tap 7 of 8 layers", "expected 0 to 6"]),
    "no tap": (lambda folder, tiny: ["--target.taps=[]"], ["taps is empty", "set --target.taps", "--features=none"]),
    "tap twice": (lambda folder, tiny: ["--target.taps=[1,3,1]"], ["tap 1 is given twice", "set --target.taps"]),
    "NaN": (_not_finite(float("nan")), ["NaN or Inf", "check the weights"]),
    "Inf": (_not_finite(float("inf")), ["NaN or Inf", "check the weights"]),
    "broken JSON": (_broken_line, ["broken.jsonl line 7", "is not JSON"]),
    "empty corpus": (_empty_corpus, ["empty.jsonl is empty"]),
    "blank corpus": (_blank_corpus, ["no document is left of 3", "3 empty"]),
    "file": (_file, ["mine.txt is a file, expected a directory"]),
}


@pytest.mark.parametrize("case", ENDS)
def test_a_build_that_cannot_be(
    case: str, tiny_target_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, says = ENDS[case]
    assert builder([*words(tmp_path, tiny_target_dir, "cache"), *change(tmp_path, tiny_target_dir)]) == 2
    said = one_line(capsys)
    for part in says:
        assert part in said


@pytest.mark.parametrize("sample", [-1, 0])
def test_an_estimate_from_no_document(
    sample: int, tiny_target_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["estimate", *words(tmp_path, tiny_target_dir, "cache")[1:], f"--sample={sample}"]
    assert builder(command) == 2
    assert f"sample is {sample}, expected 1 or more: set --sample" in one_line(capsys)


def newer(cache: Path) -> None:
    """Give a cache the next version of the format, with all its digests right."""
    manifest = json.loads(seal(open_cache(str(cache)).manifest)) | {"format": 2, "checksum": ""}
    blank = (json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()
    text = json.dumps(manifest | {"checksum": sha256(blank)}, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    (cache / "manifest.json").write_text(text)


@pytest.mark.parametrize("command", ["inspect", "verify", "fit"])
def test_a_newer_format(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = write_tiny_cache(tmp_path / "cache", documents=8)
    newer(cache)
    if command == "fit":
        assert specauf(arguments(cache, tmp_path / "run", "--model.loss=auf")) == 2
    else:
        assert builder([command, str(cache)]) == 2
    assert "manifest.json: format is 2, this version reads 1: upgrade specauf" in one_line(capsys)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"taps": (1, 2, 3)}, ["taps: (1, 2, 3) in", "(1, 2, 3, 4, 5) in the cache"]),
        ({"vocab_size": 300}, ["vocab_size: 300 in", "270 in the cache"]),
        ({"mask_token_id": 7}, ["mask_token_id: 7 in", "258 in the cache"]),
        ({"num_target_layers": 9}, ["num_target_layers: 9 in", "8 in the cache"]),
    ],
)
def test_training_goes_on_from_no_other_targets_drafter(
    changes: dict[str, Any],
    says: list[str],
    tiny_cache: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["specauf"])
    cache = open_cache(str(tiny_cache))
    fitting = DFlashSpec(num_hidden_layers=1, block_size=6).build(cache.manifest, cache.target).config
    other = replace(fitting, **changes)
    DFlashDrafter(replace(other, feature_dim=other.raw_feature_dim)).save_pretrained(tmp_path / "other")
    options = ("--model.loss=auf", "--model.drafter.init_args.block_size=6",
               f"--model.drafter.init_args.init={tmp_path / 'other'}")  # fmt: skip
    assert specauf(arguments(tiny_cache, tmp_path / "run", *options)) == 2
    said = one_line(capsys)
    for part in says:
        assert part in said
