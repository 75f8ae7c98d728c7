"""What is written, compared with golden files made by hand from the servers' sources."""

import stat
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from specauf.drafters import DFlashDrafter, DrafterConfig, TargetVocabulary
from specauf.export import export_speculators, export_zlab
from specauf.export.layout import body_shapes
from tests.export.conftest import config, golden, same, tensors


def shapes(directory):
    return {name: list(value.shape) for name, value in tensors(directory).items()}


def test_a_zlab_directory_holds_the_contract(sound_zlab):
    assert sorted(p.name for p in sound_zlab.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert config(sound_zlab) == golden("zlab_config.json")
    assert shapes(sound_zlab) == golden("zlab_tensors.json")
    with safe_open(sound_zlab / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_speculators_directory_holds_the_contract(sound_speculators):
    found = config(sound_speculators)
    assert found.pop("transformers_version")
    assert found == golden("speculators_config.json")
    extra = {"embed_tokens.weight": [270, 32], "lm_head.weight": [270, 32]}
    assert shapes(sound_speculators) == golden("zlab_tensors.json") | extra


def test_a_released_shape_has_58_tensors():
    qwen3_8b = {
        "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "intermediate_size": 12288, "vocab_size": 151936, "rope_theta": 1e6,
    }  # fmt: skip
    shape = DrafterConfig.from_target(
        qwen3_8b, num_hidden_layers=5, taps=(1, 9, 17, 25, 33), mask_token_id=151669, block_size=16
    )
    wanted = {
        name.format(i=i): tuple(size)
        for name, size in golden("qwen3_8b_tensors.json").items()
        for i in (range(5) if "{i}" in name else (0,))
    }
    assert len(wanted) == 58
    assert body_shapes(shape) == wanted


def test_both_layouts_hold_the_same_body(sound_zlab, sound_speculators, vocabulary):
    body, whole = tensors(sound_zlab), tensors(sound_speculators)
    embedding, head = whole.pop("embed_tokens.weight"), whole.pop("lm_head.weight")
    assert same(whole, body)
    assert torch.equal(embedding, vocabulary.embedding.bfloat16())
    assert torch.equal(head, vocabulary.head.bfloat16())
    assert not torch.equal(embedding, head)


def test_taps_are_counted_as_each_layout_counts_them(sound_zlab, sound_speculators):
    taps = config(sound_zlab)["dflash_config"]["target_layer_ids"]
    assert config(sound_speculators)["aux_hidden_state_layer_ids"] == [tap + 1 for tap in taps]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_precision_is_stored_as_its_config_says(drafter, facts, tmp_path, dtype):
    export_zlab(drafter, tmp_path / "z", dtype=dtype)
    export_speculators(drafter, tmp_path / "s", target=facts, dtype=dtype)
    for folder in (tmp_path / "z", tmp_path / "s"):
        assert {t.dtype for t in tensors(folder).values()} == {dtype}
        assert config(folder)["dtype"] == str(dtype).removeprefix("torch.")


def test_a_tied_target_is_written_with_both_names(drafter, facts, vocabulary, tmp_path):
    tied = replace(facts, vocabulary=TargetVocabulary(vocabulary.embedding))
    export_speculators(drafter, tmp_path / "s", target=tied, dtype=torch.float32)
    found = tensors(tmp_path / "s")
    assert torch.equal(found["embed_tokens.weight"], found["lm_head.weight"])


def test_servers_that_run_as_other_users_can_read_an_export(sound_zlab):
    assert stat.S_IMODE(sound_zlab.stat().st_mode) == 0o755
    assert {stat.S_IMODE(p.stat().st_mode) for p in sound_zlab.iterdir()} == {0o644}


def test_an_exported_drafter_loads_to_the_same_numbers(drafter, tmp_path):
    export_zlab(drafter, tmp_path / "z", dtype=torch.float32)
    loaded = DFlashDrafter.from_pretrained(tmp_path / "z")
    assert loaded.config == drafter.config
    assert same(loaded.state_dict(), drafter.state_dict())
