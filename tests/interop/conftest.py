"""Targets that others decode with, and a drafter of SmolLM2 that knows the beginnings of two answers."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from specauf.drafters import DFlash2Drafter, DFlashDrafter, DSparkDrafter
from specauf.targets import default_taps, load_target, resolve_target
from tests.builder.conftest import make_target, make_tokenizer
from tests.interop.readers import Task, named, teach

# Beginnings that SmolLM2 continues in sixteen different ways.
BEGINNINGS = (
    "Write a Python function that adds two numbers.", "Name three colours.", "What is the capital of France?",
    "Count from one to ten.", "Explain what a list is in Python.", "Tell me a short story about a cat.",
    "How do I boil an egg?", "Sort these numbers: 3, 1, 2.", "Write a haiku.", "What is 12 times 12?",
    "Translate 'good morning' to Spanish.", "List the days of the week.", "What does HTTP stand for?",
    "Write a SQL query that selects all users.", "Give me a recipe for pancakes.", "Why is the sky blue?",
)  # fmt: skip


@pytest.fixture(scope="package")
def target_directory(tmp_path_factory) -> Path:
    """A tiny random target with a tokenizer, and `target.yaml` that names it."""
    folder = tmp_path_factory.mktemp("target")
    named(make_target(), make_tokenizer(), folder)
    return folder


@pytest.fixture(scope="package")
def smollm2() -> tuple[Any, Any]:
    """Target and tokenizer."""
    return load_target(resolve_target("smollm2-135m"))


@pytest.fixture(scope="package")
def smollm2_directory(smollm2, tmp_path_factory) -> Path:
    """SmolLM2 as a server loads it, in fp32."""
    folder = tmp_path_factory.mktemp("target") / "SmolLM2-135M-Instruct"
    for part in smollm2:
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="package")
def rounded(smollm2, tmp_path_factory) -> tuple[Any, Path]:
    """SmolLM2 of bfloat16 numbers in fp32, and its directory: SGLang gives drafters such embeddings of any target.

    Read from the directory it has torch's own products, as in SGLang; with oneDNN's one of 32 answers differs.
    """
    folder = tmp_path_factory.mktemp("rounded") / "SmolLM2-135M-Instruct"
    copy.deepcopy(smollm2[0]).bfloat16().float().save_pretrained(folder)
    smollm2[1].save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval(), folder


@pytest.fixture(scope="package")
def taught(smollm2) -> tuple[DFlashDrafter, Task]:
    """A drafter that knows the first two answers' beginnings, and all prompts."""
    return teach_smollm2(*smollm2, DFlashDrafter)


@pytest.fixture(scope="package")
def taught_dflash2(smollm2) -> tuple[DFlash2Drafter, Task]:
    """The same of the other kind."""
    drafter, task = teach_smollm2(*smollm2, DFlash2Drafter)
    assert isinstance(drafter, DFlash2Drafter)
    return drafter, task


@pytest.fixture(scope="package")
def taught_dspark(smollm2) -> tuple[DFlashDrafter, Task]:
    """The same of the third kind."""
    return teach_smollm2(*smollm2, DSparkDrafter, markov_rank=64)


@pytest.fixture(scope="package")
def taught_dspark_of_own_slots(smollm2) -> tuple[DFlashDrafter, Task]:
    """The same of the third kind as DFlash counts its slots."""
    return teach_smollm2(*smollm2, DSparkDrafter, markov_rank=64, sample_from_anchor=False)


def teach_smollm2(target: Any, tokenizer: Any, kind: type[DFlashDrafter], **more: Any) -> tuple[DFlashDrafter, Task]:
    torch.manual_seed(0)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        for text in BEGINNINGS
    ]
    shape: dict[str, Any] = {
        "taps": default_taps(target.config.num_hidden_layers),
        "mask_token_id": 16,
        "block_size": 8,
    } | more
    # At five times this rate it learns no more than the commonest tokens.
    drafter = teach(target, prompts[:2], 20, kind=kind, steps=120, rate=4e-4, **shape)
    return drafter, Task(target, prompts, new=32)
