"""Exports in z-lab's layout in llama.cpp: its converter, and its server, which here runs on a CPU."""

import json
from pathlib import Path

import pytest
import torch

from specauf.drafters import DFlash2Drafter, DSparkDrafter
from specauf.export import TargetFacts, export_zlab
from tests.drafters.tiny import tiny_drafter
from tests.interop.environments import run_in
from tests.interop.llama_cpp import convert, decode_with_llama_cpp, needs_compiler, sources
from tests.interop.readers import Task, compare_decoding, unchosen, whole_blocks_without_its_parts

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def target(smollm2_directory, tmp_path_factory) -> Path:
    return convert(smollm2_directory, tmp_path_factory.mktemp("gguf") / "target.gguf")


@needs_compiler
@pytest.mark.parametrize("known", ["taught", "taught_dflash2", "taught_dspark", "taught_dspark_of_own_slots"])
@pytest.mark.parametrize("slots", [7, 3])
def test_its_server_decodes_smollm2_as_ours_does_token_for_token_and_cycle_for_cycle(
    known, target, smollm2_directory, tmp_path, slots, request
):
    drafter, task = request.getfixturevalue(known)
    export_zlab(drafter, tmp_path / "zlab", dtype=torch.float32, target=TargetFacts.from_file(smollm2_directory))
    made = convert(tmp_path / "zlab", tmp_path / "drafter.gguf", "--target-model-dir", str(smollm2_directory))
    theirs = decode_with_llama_cpp(task, target, made, tmp_path, slots, drafter.name.replace("dflash2", "dflash"))
    lengths = compare_decoding(task, drafter, theirs, block_size=slots + 1)
    assert len(lengths) > 50
    assert {1, slots + 1} < set(lengths)
    if isinstance(drafter, DFlash2Drafter) and slots == drafter.config.slots:
        first = Task(task.model, task.prompts[:2], task.new)  # those it has learnt
        assert max(whole_blocks_without_its_parts(first, drafter)) < lengths.count(slots + 1)
    if isinstance(drafter, DSparkDrafter):
        with pytest.raises(AssertionError):
            compare_decoding(task, unchosen(drafter), theirs, block_size=slots + 1)


@pytest.mark.parametrize("kind", ["dflash", "dflash2", "dspark", "dspark of own slots"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_converter_keeps_every_number_of_an_export(smollm2, smollm2_directory, tmp_path, dtype, kind):
    drafter = tiny_drafter(kind, smollm2[0], taps=(1, 8, 14, 20, 27), mask_token_id=16, block_size=16)
    export_zlab(drafter, tmp_path / "zlab", dtype=dtype, target=TargetFacts.from_file(smollm2_directory))
    made = convert(tmp_path / "zlab", tmp_path / "drafter.gguf", "--target-model-dir", str(smollm2_directory))
    words = (str(tmp_path / "zlab"), str(made))
    record = json.loads(run_in("llama_cpp", "llama_cpp_read.py", *words, PYTHONPATH=str(sources() / "gguf-py")))
    assert all(record["equal"].values())
    of_layers = 11 + 4 * (kind == "dflash2")
    of_heads = {"dflash": 0, "dflash2": 3, "dspark": 4}[drafter.name]
    assert len(record["equal"]) == 3 + of_heads + of_layers * drafter.config.num_hidden_layers
    assert record["left"] == []
    fields = record["fields"]
    own = {"conv_kernel_size": 2, "conv_group_size": 8, "selector_rank": 12, "selector_top_k": 5}
    assert {name: fields.pop(f"dflash.{name}", None) for name in own} == (
        own if kind == "dflash2" else dict.fromkeys(own)
    )
    of_dspark = {"sample_from_anchor": kind == "dspark", "has_confidence_head": True}
    assert {name: fields.pop(f"dflash.{name}", None) for name in of_dspark} == (
        of_dspark if drafter.name == "dspark" else dict.fromkeys(of_dspark)
    )
    assert fields.pop("dflash.attention.layer_norm_rms_epsilon") == pytest.approx(drafter.config.rms_norm_eps)
    assert fields == {
        "general.architecture": "dflash",
        "dflash.block_count": 2,
        "dflash.block_size": 15 if kind == "dspark" else 16,
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
