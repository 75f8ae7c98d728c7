"""What a drafter takes from its target's config, and what it refuses."""

import json
from pathlib import Path

import pytest
import torch

from specauf.drafters import DFlashDrafter, DrafterConfig, TargetVocabulary
from specauf.errors import UserError
from tests.drafters.tiny import FAMILIES, MASK, TAPS, prompt, tiny_config, tiny_dflash, tiny_target

QWEN3 = {
    "model_type": "qwen3",
    "hidden_size": 4096,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 12288,
    "vocab_size": 151936,
    "rope_theta": 1000000,
    "rms_norm_eps": 1e-6,
    "eos_token_id": [151645, 151643],
}


def derive(**changes):
    return DrafterConfig.from_target(QWEN3 | changes, taps=[1, 9, 17, 25, 33], mask_token_id=151669)


def test_qwen3_8b_gives_the_shape_of_the_released_drafter():
    config = derive()
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (32, 8, 128)
    assert (config.intermediate_size, config.rope_theta, config.feature_dim) == (12288, 1e6, 5 * 4096)
    assert config.eos_token_id == 151645


@pytest.mark.parametrize(
    ("target", "theta"),
    [
        ({"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5),
        (
            {
                "rope_theta": None,
                "rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}},
            },
            1e6,
        ),
    ],
)
def test_rope_base_is_found_wherever_the_family_keeps_it(target, theta):
    assert derive(**target).rope_theta == theta


def test_multimodal_targets_are_read_at_their_text_config():
    assert DrafterConfig.from_target(
        {"model_type": "gemma3", "text_config": QWEN3}, taps=TAPS, mask_token_id=3
    ) == DrafterConfig.from_target(QWEN3, taps=TAPS, mask_token_id=3)


def test_partial_rotary_of_the_target_is_not_copied_to_the_drafter():
    config = derive(partial_rotary_factor=0.25, rope_scaling={"rope_type": "yarn", "factor": 4.0})
    raw = config.to_zlab()
    assert "partial_rotary_factor" not in raw
    assert raw["rope_scaling"] is None
    # All of head_dim turns: a late pair of dimensions depends on the position too.
    from specauf.drafters.blocks import rotate, rotation

    turned = rotate(torch.ones(1, 1, 128), rotation(torch.tensor([1000]), 128, config.rope_theta, torch.float32))
    assert (turned[0, 0, [0, 31, 32, 40]] - 1).abs().min() > 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_token_id": 151936}, r"mask_token_id: 151936 found, a row .* \(0..151935\) expected"),
        ({"mask_token_id": -1}, "mask_token_id: -1 found"),
        ({"taps": (1, 35)}, "layer 35 is the last of 36"),
        ({"taps": (1, 36)}, "layer 36 found, 0..34 expected"),
        ({"taps": (1, 1)}, "repeats a layer"),
        ({"block_size": 1}, "block_size: 1 found, at least 2"),
        ({"num_key_value_heads": 5}, "num_key_value_heads: 5 does not divide num_attention_heads 32"),
        ({"head_dim": 127}, "head_dim: 127 found, an even number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: 0 found, at least 1"),
    ],
)
def test_shapes_that_no_server_loads_are_refused(changes, message):
    settings = {"taps": (1, 9), "mask_token_id": 151669} | changes
    with pytest.raises(UserError, match=message):
        DrafterConfig.from_target(QWEN3, **settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"intermediate_size": [1, 2]}, r"intermediate_size: \[1, 2\] in the target's config"),
        ({"rope_theta": None}, "rope_theta: None in the target's config"),
        ({"embedding_multiplier": 12.0}, "embedding_multiplier: 12.0 in the target's config"),
    ],
)
def test_targets_that_a_drafter_cannot_sit_on_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        derive(**changes)


def test_a_mask_token_beyond_the_stored_rows_is_refused_when_the_embedding_is_smaller_than_its_config():
    # ModelOpt #1621: a token added by resizing exists in the config, not in the weights that ship.
    with pytest.raises(UserError, match="mask_token_id: 151669 found"):
        DrafterConfig.from_target(QWEN3, taps=TAPS, mask_token_id=151669, vocab_size=151643)


def test_a_padded_vocabulary_counts_the_rows_that_are_stored():
    target = tiny_target()
    padded = TargetVocabulary(torch.cat([target.get_input_embeddings().weight, torch.zeros(3, 32)]))
    drafter = tiny_dflash(target, vocab_size=64)
    drafter.check(padded, 64)
    with pytest.raises(UserError, match="vocab_size: 64 given, 61 expected"):
        tiny_dflash(target).check(padded, 64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_scaling"),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor: 0.25"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"attention_bias": True}, "attention_bias: True"),
        ({"hidden_act": "gelu"}, "hidden_act: gelu"),
        ({"head_dim": None}, "head_dim: missing"),
        ({"dflash_config": {"mask_token_id": 3, "target_layer_ids": [0, 2], "causal": True}}, "causal: True"),
        ({"is_causal": True}, "is_causal: True"),
        ({"dflash_config": {"mask_token_id": 3, "target_layer_ids": [0, 2], "use_swa": True}}, "use_swa: True"),
        ({"use_sliding_window": True, "layer_types": None}, "use_sliding_window: True"),
        ({"is_neox_style": False}, "is_neox_style: False"),
        ({"rope_is_neox_style": False}, "rope_is_neox_style: False"),
        ({"dflash_config": {"mask_token_id": "3", "target_layer_ids": [0, 2]}}, "mask_token_id: '3'"),
        ({"dflash_config": {"mask_token_id": 3, "target_layer_ids": [0, "2"]}}, r"target_layer_ids: \[0, '2'\]"),
    ],
)
def test_released_drafters_that_would_run_differently_here_are_refused(tmp_path: Path, changes, message):
    tiny_dflash(tiny_target()).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(UserError, match=message):
        DFlashDrafter.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{", None])
def test_a_directory_that_is_not_a_drafter_is_refused_in_one_line(tmp_path: Path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json") as caught:
        DFlashDrafter.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_config_survives_its_dict_and_unknown_fields_are_refused():
    config = tiny_config(tiny_target())
    assert DrafterConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(UserError, match=r"unknown fields \['colour'\]"):
        DrafterConfig.from_dict(config.to_dict() | {"colour": 1})


@pytest.mark.parametrize("family", FAMILIES)
def test_vocabulary_embeds_and_scores_as_the_target_does(family):
    target = tiny_target(family)
    vocabulary = TargetVocabulary.from_target(target)
    seen = {}
    target.model.layers[0].register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    ids = prompt(9)[None]
    out = target(ids, output_hidden_states=True)
    torch.testing.assert_close(vocabulary.embed(ids), seen["x"])
    torch.testing.assert_close(vocabulary.logits(out.hidden_states[-1]), out.logits)
    tied = target.get_output_embeddings().weight is target.get_input_embeddings().weight
    assert (vocabulary.head.data_ptr() == vocabulary.embedding.data_ptr()) == tied
    assert vocabulary.state_dict() == {}


def test_a_reduced_head_scores_its_tokens_only():
    target = tiny_target()
    whole = TargetVocabulary.from_target(target)
    ids = torch.tensor([50, 3, 7])
    some = whole.restrict(ids)
    hidden = torch.randn(4, 32)
    torch.testing.assert_close(some.logits(hidden), whole.logits(hidden)[:, [3, 7, 50]])
    draft, known = some.to_draft(torch.tensor([[7, 8, 50]]))
    assert draft.tolist() == [[1, 0, 2]]
    assert known.tolist() == [[True, False, True]]
    assert some.to_target(torch.tensor([0, 1, 2])).tolist() == [3, 7, 50]
    assert some.widen(torch.tensor([[0.2, 0.3, 0.5]]))[0, [3, 7, 50]].tolist() == pytest.approx([0.2, 0.3, 0.5])
    assert (some.restricted, whole.restricted) == (True, False)
    for bad in ([3, 3], [61], [-1]):
        with pytest.raises(UserError, match="draft vocabulary"):
            whole.restrict(torch.tensor(bad))


def test_softcapped_logits_follow_gemma_2():
    vocabulary = TargetVocabulary.from_config(
        {"model_type": "gemma2", "final_logit_softcapping": 3.0}, torch.randn(9, 4)
    )
    hidden = torch.randn(2, 4) * 5
    torch.testing.assert_close(vocabulary.logits(hidden), 3 * torch.tanh(hidden @ vocabulary.embedding.T / 3))
    assert vocabulary.embedding_scale == 2.0


def test_mask_slots_hold_the_mask_tokens_embedding():
    target = tiny_target()
    drafter, vocabulary = tiny_dflash(target), TargetVocabulary.from_target(target)
    moved = TargetVocabulary(vocabulary.embedding.clone())
    moved.embedding[MASK] += 1.0
    seen = {}
    drafter.layers[0].register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    for name, v in (("before", vocabulary), ("after", moved)):
        drafter.block_rows(prompt(2), torch.tensor([0, 0]), _no_context(drafter), _own_block, v)
        seen[name] = seen.pop("x")
    torch.testing.assert_close(seen["after"][:, 1:] - seen["before"][:, 1:], torch.ones(2, 1, 32))
    assert torch.equal(seen["after"][:, 0], seen["before"][:, 0])


def _no_context(drafter):
    return [(torch.zeros(0, 2, 8), torch.zeros(0, 2, 8)) for _ in drafter.layers]


def _own_block(query, context_key, context_value, block_key, block_value):
    return query
