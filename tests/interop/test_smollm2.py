"""Exports of a SmolLM2 drafter in z-lab's package, vLLM, SGLang, llama.cpp and speculators, on HumanEval.

SPECAUF_DRAFTER names a trained run (by default the demo's); SPECAUF_PROMPTS shortens the run.
"""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from specauf.checkpoint import load_drafter
from specauf.drafters import DFlashDrafter, DrafterConfig, TargetVocabulary
from specauf.evaluation.benchmarks import load_benchmark
from specauf.evaluation.run import encode
from specauf.export import TargetFacts, export_speculators, export_zlab
from specauf.targets import mask_token_id, resolve_target
from tests.interop.environments import run_in
from tests.interop.llama_cpp import convert, decode_with_llama_cpp, needs_compiler
from tests.interop.readers import (
    Task,
    compare_decoding,
    decode_with,
    decode_with_sglang,
    decode_with_vllm,
    needs_cpu_torch,
)

pytestmark = pytest.mark.slow
NAME = "smollm2-135m"
PROMPTS = int(os.environ.get("SPECAUF_PROMPTS", "32"))
TRAINED = Path(os.environ.get("SPECAUF_DRAFTER", "runs/demo/auf"))


@pytest.fixture(scope="module")
def drafter(smollm2):
    """The trained one, or random weights, which accept next to nothing but must decode as well."""
    if TRAINED.exists():
        return load_drafter(TRAINED).eval()
    target, tokenizer = smollm2
    about = resolve_target(NAME)
    mask = mask_token_id(about, tokenizer, target.config.vocab_size)
    torch.manual_seed(0)
    return DFlashDrafter(DrafterConfig.from_target(target.config.to_dict(), taps=about.taps, mask_token_id=mask)).eval()


@pytest.fixture(scope="module")
def task(smollm2) -> Task:
    prompts = [encode(smollm2[1], p.text)[0].tolist() for p in load_benchmark("humaneval", PROMPTS)]
    return Task(smollm2[0], prompts, new=40)


def told(task: Task, lengths: list[int]) -> None:
    mean = sum(lengths) / len(lengths)
    print(f"{len(task.prompts)} prompts, the same tokens, and in {len(lengths)} cycles the same lengths, {mean:.3f}")
    assert len(lengths) > PROMPTS


def test_zlabs_package_decodes_humaneval_as_we_do(task, drafter, tmp_path):
    export_zlab(drafter, tmp_path / "zlab", dtype=torch.float32)
    theirs = decode_with("dflash", task, NAME, tmp_path / "zlab", tmp_path, torch.get_num_threads())
    told(task, compare_decoding(task, drafter, theirs))


@needs_cpu_torch
def test_vllm_decodes_humaneval_as_we_do(task, smollm2_directory, drafter, tmp_path):
    export_zlab(drafter, tmp_path / "zlab", dtype=torch.float32)
    theirs = decode_with_vllm(task, smollm2_directory, tmp_path / "zlab", tmp_path, drafter.config.slots)
    told(task, compare_decoding(task, drafter, theirs))


def test_sglang_decodes_humaneval_as_we_do(task, rounded, drafter, tmp_path):
    target, directory = rounded
    task = replace(task, model=target)
    export_zlab(drafter, tmp_path / "zlab", dtype=torch.float32)
    theirs = decode_with_sglang(task, directory, tmp_path / "zlab", tmp_path, drafter.config.slots)
    told(task, compare_decoding(task, drafter, theirs))


@needs_compiler
def test_llama_cpp_decodes_humaneval_as_we_do(task, smollm2_directory, drafter, tmp_path):
    export_zlab(drafter, tmp_path / "zlab", dtype=torch.float32)
    target = convert(smollm2_directory, tmp_path / "target.gguf")
    made = convert(tmp_path / "zlab", tmp_path / "drafter.gguf", "--target-model-dir", str(smollm2_directory))
    theirs = decode_with_llama_cpp(task, target, made, tmp_path, drafter.config.slots)
    told(task, compare_decoding(task, drafter, theirs))


def test_speculators_gives_our_logits(smollm2, drafter, tmp_path):
    target = smollm2[0]
    facts = TargetFacts.from_config(
        target.config.to_dict(), "SmolLM2-135M-Instruct", vocabulary=TargetVocabulary.from_target(target)
    )
    export_zlab(drafter, tmp_path / "zlab", dtype=torch.float32)
    export_speculators(drafter, tmp_path / "s", target=facts, dtype=torch.float32)
    record = json.loads(run_in("speculators", "speculators_forward.py", str(tmp_path / "s"), str(tmp_path / "zlab")))
    print(record)
    assert record["rows"] == 4 * drafter.config.slots
    assert record["difference"] < 1e-4
