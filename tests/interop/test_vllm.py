"""Exports in both layouts in vLLM, which here runs on a CPU."""

from typing import Any

import pytest
import torch
import transformers

from specauf.drafters import DFlash2Drafter, DFlashDrafter, DSparkDrafter, TargetVocabulary
from specauf.export import TargetFacts, export_speculators, export_zlab
from tests.builder.conftest import make_tokenizer
from tests.interop.readers import Task, compare_decoding, decode_with_vllm, needs_cpu_torch, teach, unchosen

pytestmark = [pytest.mark.slow, needs_cpu_torch]


@pytest.mark.parametrize("layout", ["zlab", "speculators"])
@pytest.mark.parametrize("slots", [7, 3])
def test_vllm_decodes_smollm2_as_ours_does_token_for_token_and_cycle_for_cycle(
    taught, smollm2_directory, tmp_path, layout, slots
):
    drafter, task = taught
    out = tmp_path / "drafter"
    if layout == "zlab":
        export_zlab(drafter, out, dtype=torch.float32)
    else:
        vocabulary = TargetVocabulary.from_target(task.model)
        facts = TargetFacts.from_config(task.model.config.to_dict(), str(smollm2_directory), vocabulary=vocabulary)
        export_speculators(drafter, out, target=facts, dtype=torch.float32)
    theirs = decode_with_vllm(task, smollm2_directory, out, tmp_path, slots)
    lengths = compare_decoding(task, drafter, theirs, block_size=slots + 1)
    assert len(lengths) > 50
    assert {1, slots + 1} < set(lengths)


# Heads of 32 are the narrowest that vLLM's attention takes on a CPU.
SHAPE: dict[str, Any] = {
    "vocab_size": 270, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 512, "initializer_range": 0.3, "bos_token_id": None,
    "eos_token_id": 269,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Qwen3", {"head_dim": 64, "tie_word_embeddings": True}),
        ("Qwen2", {}),
        ("Mistral", {"sliding_window": None}),
        ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    ],
)
def test_vllm_decodes_targets_of_other_families_as_ours_does(tmp_path, family: str, changes: dict[str, Any]):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SHAPE | changes)
    target = getattr(transformers, f"{family}ForCausalLM")(config).eval().requires_grad_(False)
    for part in (target, make_tokenizer()):
        part.save_pretrained(tmp_path / "target")
    task = Task(target, torch.randint(0, 256, (8, 9)).tolist(), new=24)
    settings: dict[str, Any] = {"taps": (1, 3, 4), "mask_token_id": 258, "block_size": 6}
    drafter = teach(target, task.prompts[::2], 16, steps=150, rate=3e-3, **settings)
    export_zlab(drafter, tmp_path / "drafter", dtype=torch.float32, target=TargetFacts.from_file(tmp_path / "target"))
    theirs = decode_with_vllm(task, tmp_path / "target", tmp_path / "drafter", tmp_path, slots=5)
    lengths = compare_decoding(task, drafter, theirs)
    assert len(lengths) > 20
    assert {1, 6} < set(lengths)


@pytest.mark.parametrize(("kind", "own", "layout", "slots"), [
    (DFlash2Drafter, {"selector_top_k": 7}, "zlab", 5), (DFlash2Drafter, {"selector_top_k": 7}, "speculators", 5),
    (DFlash2Drafter, {"selector_top_k": 7}, "zlab", 3),
    (DSparkDrafter, {}, "zlab", 5), (DSparkDrafter, {}, "speculators", 5), (DSparkDrafter, {}, "zlab", 3),
    (DSparkDrafter, {"sample_from_anchor": False, "enable_confidence_head": False}, "zlab", 5),
    (DSparkDrafter, {"sample_from_anchor": False}, "speculators", 3),
    (DFlashDrafter, {}, "zlab", 5),
])  # fmt: skip
def test_vllms_model_runner_for_gpus_decodes_as_ours_does(
    tmp_path, kind: type[DFlashDrafter], own: dict[str, Any], layout: str, slots: int
):
    torch.manual_seed(0)
    target = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).eval().requires_grad_(False)
    for part in (target, make_tokenizer()):
        part.save_pretrained(tmp_path / "target")
    task = Task(target, torch.randint(0, 256, (8, 9)).tolist(), new=24)
    settings: dict[str, Any] = {"taps": (1, 3, 4), "mask_token_id": 258, "block_size": 6, "kind": kind, **own}
    drafter = teach(target, task.prompts[::2], 16, steps=150, rate=3e-3, **settings)
    vocabulary = TargetVocabulary.from_target(target)
    facts = TargetFacts.from_config(target.config.to_dict(), "the target", vocabulary=vocabulary)
    export = export_zlab if layout == "zlab" else export_speculators
    export(drafter, tmp_path / "drafter", dtype=torch.float32, target=facts)
    method = "dspark" if kind is DSparkDrafter else "dflash"
    theirs = decode_with_vllm(
        task, tmp_path / "target", tmp_path / "drafter", tmp_path, slots, as_on_gpus=True, method=method
    )
    lengths = compare_decoding(task, drafter, theirs, block_size=slots + 1)
    assert len(lengths) > 20
    assert {1, slots + 1} <= set(lengths)
    if kind is not DFlashDrafter:
        with pytest.raises(AssertionError):
            compare_decoding(task, unchosen(drafter), theirs, block_size=slots + 1)


@pytest.mark.parametrize(("known", "method"), [("taught_dflash2", "dflash"), ("taught_dspark", "dspark")])
def test_vllms_model_runner_for_gpus_decodes_smollm2_as_ours_does(known, method, smollm2_directory, tmp_path, request):
    drafter, task = request.getfixturevalue(known)
    export_zlab(drafter, tmp_path / "drafter", dtype=torch.float32)
    words = (task, smollm2_directory, tmp_path / "drafter", tmp_path, 7)
    theirs = decode_with_vllm(*words, as_on_gpus=True, method=method)
    lengths = compare_decoding(task, drafter, theirs)
    assert len(lengths) > 50
    assert len(set(lengths)) > 3
    with pytest.raises(AssertionError):
        compare_decoding(task, unchosen(drafter), theirs)
