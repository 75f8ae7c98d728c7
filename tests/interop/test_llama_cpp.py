"""Exports in z-lab's layout in llama.cpp: its converter, and its server, which here runs on a CPU."""

import json
from pathlib import Path

import pytest
import torch

from specauf.export import TargetFacts, export_zlab
from tests.drafters.tiny import tiny_dflash
from tests.interop.environments import run_in
from tests.interop.llama_cpp import convert, decode_with_llama_cpp, needs_compiler, sources
from tests.interop.readers import compare_decoding

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def target(smollm2_directory, tmp_path_factory) -> Path:
    return convert(smollm2_directory, tmp_path_factory.mktemp("gguf") / "target.gguf")


@needs_compiler
@pytest.mark.parametrize("slots", [7, 3])
def test_its_server_decodes_smollm2_as_ours_does_token_for_token_and_cycle_for_cycle(
    taught, target, smollm2_directory, tmp_path, slots
):
    drafter, task = taught
    export_zlab(drafter, tmp_path / "zlab", dtype=torch.float32, target=TargetFacts.from_file(smollm2_directory))
    made = convert(tmp_path / "zlab", tmp_path / "drafter.gguf", "--target-model-dir", str(smollm2_directory))
    theirs = decode_with_llama_cpp(task, target, made, tmp_path, slots)
    lengths = compare_decoding(task, drafter, theirs, block_size=slots + 1)
    assert len(lengths) > 50
    assert {1, slots + 1} < set(lengths)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_converter_keeps_every_number_of_an_export(smollm2, smollm2_directory, tmp_path, dtype):
    drafter = tiny_dflash(smollm2[0], taps=(1, 8, 14, 20, 27), mask_token_id=16, block_size=16)
    export_zlab(drafter, tmp_path / "zlab", dtype=dtype, target=TargetFacts.from_file(smollm2_directory))
    made = convert(tmp_path / "zlab", tmp_path / "drafter.gguf", "--target-model-dir", str(smollm2_directory))
    words = (str(tmp_path / "zlab"), str(made))
    record = json.loads(run_in("llama_cpp", "llama_cpp_read.py", *words, PYTHONPATH=str(sources() / "gguf-py")))
    assert all(record["equal"].values())
    assert len(record["equal"]) == 3 + 11 * drafter.config.num_hidden_layers
    assert record["left"] == []
    fields = record["fields"]
    assert fields.pop("dflash.attention.layer_norm_rms_epsilon") == pytest.approx(drafter.config.rms_norm_eps)
    assert fields == {
        "general.architecture": "dflash",
        "dflash.block_count": 2,
        "dflash.block_size": 16,
        "dflash.target_layers": [2, 9, 15, 21, 28],  # layers whose input is tapped
        "tokenizer.ggml.mask_token_id": 16,
        "dflash.context_length": 8192,
        "dflash.embedding_length": 576,
        "dflash.feed_forward_length": 1536,
        "dflash.attention.causal": False,
        "dflash.attention.head_count": 9,
        "dflash.attention.head_count_kv": 3,
        "dflash.attention.key_length": 64,
        "dflash.attention.value_length": 64,
        "dflash.rope.freq_base": 100000.0,
        **{name: value for name, value in fields.items() if name == "dflash.rope.scaling.type" and value == "none"},
    }
