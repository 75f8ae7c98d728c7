"""DFlash: names, shapes, and one forward pass for training and decoding."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from specauf.drafters import ContextMemory, DFlashDrafter
from specauf.errors import UserError
from tests.drafters.tiny import (
    BLOCK,
    MASK,
    TAPS,
    batch_of,
    document,
    tiny_config,
    tiny_dflash,
    tiny_target,
    vocabulary_of,
)


def test_state_dict_has_exactly_the_names_and_shapes_of_released_drafters():
    config = tiny_config(tiny_target())
    h, heads, kv, d, inter = 32, 4, 2, 8, 48
    wanted = {"fc.weight": (h, 2 * h), "hidden_norm.weight": (h,), "norm.weight": (h,)}
    for i in range(2):
        wanted |= {
            f"layers.{i}.input_layernorm.weight": (h,),
            f"layers.{i}.post_attention_layernorm.weight": (h,),
            f"layers.{i}.self_attn.q_proj.weight": (heads * d, h),
            f"layers.{i}.self_attn.k_proj.weight": (kv * d, h),
            f"layers.{i}.self_attn.v_proj.weight": (kv * d, h),
            f"layers.{i}.self_attn.o_proj.weight": (h, heads * d),
            f"layers.{i}.self_attn.q_norm.weight": (d,),
            f"layers.{i}.self_attn.k_norm.weight": (d,),
            f"layers.{i}.mlp.gate_proj.weight": (inter, h),
            f"layers.{i}.mlp.up_proj.weight": (inter, h),
            f"layers.{i}.mlp.down_proj.weight": (h, inter),
        }
    assert {k: tuple(v.shape) for k, v in DFlashDrafter(config).state_dict().items()} == wanted


@pytest.mark.parametrize("packed", [True, False])
def test_training_forward_equals_decoding_forward_at_every_anchor(packed: bool):
    target = tiny_target()
    drafter, vocabulary = tiny_dflash(target), vocabulary_of(target)
    documents = [document(target, 5, 12, 1), document(target, 1, 9, 2), document(target, 9, 3, 3)]
    # Every position with at least one context row, from a document's start to its last token.
    anchors = [list(range(1, len(d.tokens))) for d in documents]
    if packed:
        rows = list(drafter(batch_of(documents, anchors), vocabulary))
    else:
        rows = [row for d, a in zip(documents, anchors, strict=True) for row in drafter(batch_of([d], [a]), vocabulary)]
    number = 0
    for d, positions in zip(documents, anchors, strict=True):
        for anchor in positions:
            torch.testing.assert_close(rows[number], _decoding_rows(drafter, vocabulary, d, anchor), atol=1e-5, rtol=0)
            number += 1
    assert number == len(rows)


def _decoding_rows(drafter, vocabulary, d, anchor):
    """Hidden states at one anchor as decoding sees them: context rows arrive a few at a time."""
    memory = ContextMemory(1)
    tokens, features = torch.from_numpy(d.tokens)[None], torch.from_numpy(d.features)[None]
    for start in range(0, anchor, 4):
        # As after a verified block: more rows are given than count.
        end, given = min(start + 4, anchor), min(start + 6, len(d.tokens))
        drafter.remember(memory, tokens[:, start:given], features[:, start:given], [end - start], vocabulary)
    return drafter.next_block_rows(memory, tokens[:, anchor], BLOCK - 1, vocabulary)[0]


def test_forward_equals_a_slow_reference_written_from_the_paper():
    target = tiny_target()
    drafter, vocabulary = tiny_dflash(target).double(), vocabulary_of(target).double()
    documents = [document(target, 4, 8, 1), document(target, 6, 7, 2)]
    anchors = [[1, 4, 9], [6, 12]]
    rows = drafter(batch_of(documents, anchors), vocabulary)
    number = 0
    for d, positions in zip(documents, anchors, strict=True):
        for anchor in positions:
            torch.testing.assert_close(rows[number], _reference(drafter, vocabulary, d, anchor), atol=1e-6, rtol=0)
            number += 1


def _reference(drafter, vocabulary, d, anchor):
    """One block, one head at a time, in float64."""
    w = {k: v.double() for k, v in drafter.state_dict().items()}

    def norm(x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + drafter.config.rms_norm_eps).sqrt() * weight

    def turn(x, position):
        out = x.clone()
        for i in range(4):
            angle = position * drafter.config.rope_theta ** (-2 * i / 8)
            c, s = torch.cos(torch.tensor(angle).double()), torch.sin(torch.tensor(angle).double())
            out[i], out[i + 4] = x[i] * c - x[i + 4] * s, x[i + 4] * c + x[i] * s
        return out

    context = norm(torch.from_numpy(d.features[:anchor]).double() @ w["fc.weight"].T, w["hidden_norm.weight"])
    ids = torch.tensor([int(d.tokens[anchor])] + [MASK] * (BLOCK - 1))
    x = vocabulary.embedding.double()[ids]
    for i in range(2):
        p = f"layers.{i}."
        h = norm(x, w[p + "input_layernorm.weight"])
        seen = torch.cat([context, h])
        heads = []
        for head in range(4):
            q, k = slice(8 * head, 8 * head + 8), slice(8 * (head // 2), 8 * (head // 2) + 8)
            queries = norm(h @ w[p + "self_attn.q_proj.weight"][q].T, w[p + "self_attn.q_norm.weight"])
            keys = norm(seen @ w[p + "self_attn.k_proj.weight"][k].T, w[p + "self_attn.k_norm.weight"])
            values = seen @ w[p + "self_attn.v_proj.weight"][k].T
            queries = torch.stack([turn(r, anchor + n) for n, r in enumerate(queries)])
            keys = torch.stack([turn(r, n) for n, r in enumerate(keys)])
            heads.append((queries @ keys.T / 8**0.5).softmax(-1) @ values)
        x = x + torch.cat(heads, -1) @ w[p + "self_attn.o_proj.weight"].T
        h = norm(x, w[p + "post_attention_layernorm.weight"])
        gate, up = h @ w[p + "mlp.gate_proj.weight"].T, h @ w[p + "mlp.up_proj.weight"].T
        x = x + (gate * torch.sigmoid(gate) * up) @ w[p + "mlp.down_proj.weight"].T
    return norm(x, w["norm.weight"])[1:]


def test_activation_checkpointing_changes_no_gradient():
    target = tiny_target()
    drafter, vocabulary = tiny_dflash(target).train(), vocabulary_of(target)
    batch = batch_of([document(target, 5, 12, 1)], [[5, 8]])
    gradients = []
    for drafter.activation_checkpointing in (False, True):
        drafter.zero_grad()
        drafter(batch, vocabulary).square().sum().backward()
        gradients.append([p.grad.clone() for p in drafter.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_saved_drafter_comes_back_and_its_files_are_of_the_released_layout(tmp_path: Path):
    target = tiny_target()
    drafter, vocabulary = tiny_dflash(target), vocabulary_of(target)
    drafter.save_pretrained(tmp_path)
    again = DFlashDrafter.from_pretrained(tmp_path)
    batch = batch_of([document(target, 5, 12, 1)], [[5, 8]])
    assert torch.equal(again(batch, vocabulary), drafter(batch, vocabulary))
    assert again.config == drafter.config
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["model_type"] == "qwen3"
    assert raw["block_size"] == raw["dflash_config"]["block_size"] == BLOCK
    assert raw["dflash_config"] == {
        "mask_token_id": MASK,
        "target_layer_ids": list(TAPS),
        "block_size": BLOCK,
        "causal": False,
    }
    assert set(load_file(tmp_path / "model.safetensors")) == set(drafter.state_dict())


def test_a_sketch_folds_into_fc_without_changing_the_output(tmp_path: Path):
    target = tiny_target()
    d = document(target, 5, 12, 1)
    basis = torch.linalg.qr(torch.randn(64, 10)).Q
    scale = torch.rand(64) + 0.5
    drafter, vocabulary = tiny_dflash(target, feature_dim=10), vocabulary_of(target)
    raw = torch.from_numpy(d.features)
    batch = batch_of([d], [[5, 8]])
    sketched = type(batch)(**(batch.__dict__ | {"features": raw / scale @ basis}))
    folded = drafter.fold_sketch({"basis": basis, "scale": scale})
    torch.testing.assert_close(folded(batch, vocabulary), drafter(sketched, vocabulary), atol=1e-5, rtol=0)
    assert folded.servable
    with pytest.raises(UserError, match="reads a sketch of 10 numbers, 64 raw features"):
        drafter.save_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("fc.weight"), "tensor fc.weight missing"),
        (lambda w: w.update({"lm_head.weight": torch.zeros(2, 2)}), "tensor lm_head.weight unknown"),
        (lambda w: w.update({"norm.weight": torch.zeros(3)}), r"tensor norm.weight has shape \(3,\), \(32,\) expected"),
    ],
)
def test_a_checkpoint_with_other_tensors_is_refused(tmp_path: Path, change, message: str):
    from safetensors.torch import save_file

    tiny_dflash(tiny_target()).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=message):
        DFlashDrafter.from_pretrained(tmp_path)


def test_a_broken_drafter_is_not_written(tmp_path: Path):
    drafter = tiny_dflash(tiny_target())
    drafter.fc.weight.data[0, 0] = torch.nan
    with pytest.raises(UserError, match=r"fc\.weight: holds numbers that are not finite"):
        drafter.save_pretrained(tmp_path)


def test_another_targets_features_and_vocabulary_are_refused_with_both_values():
    target = tiny_target()
    batch = batch_of([document(target, 5, 12, 1, taps=(0, 1, 2))], [[5, 8]])
    with pytest.raises(UserError, match="features: 96 given, 64 expected"):
        tiny_dflash(target)(batch, vocabulary_of(target))
    drafter = tiny_dflash(target, vocab_size=64)
    with pytest.raises(UserError, match="vocab_size: 61 given, 64 expected"):
        drafter(batch_of([document(target, 5, 12, 1)], [[5]]), vocabulary_of(target))
