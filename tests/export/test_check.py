"""Every way known to lose acceptance in a server without a word, and that `--check` names it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from specauf.export import check_directory, export_speculators
from tests.export.conftest import change, refused


@dataclass(frozen=True)
class Fault:
    """What was done to a sound directory, and the field that the check must name."""

    name: str
    field: str
    edit: Callable[[dict[str, Any], dict[str, torch.Tensor]], object]
    needs_target: bool = False


def put(*path: str | int, to: Any) -> Callable[[dict[str, Any], dict[str, torch.Tensor]], None]:
    """Set a config field."""

    def edit(raw: Any, weights: Any) -> None:
        for key in path[:-1]:
            raw = raw[key]
        raw[path[-1]] = to

    return edit


def drop(*path: str) -> Callable[[dict[str, Any], dict[str, torch.Tensor]], None]:
    """Remove a config field."""

    def edit(raw: Any, weights: Any) -> None:
        for key in path[:-1]:
            raw = raw[key]
        del raw[path[-1]]

    return edit


def rename(old: str, new: str) -> Callable[[dict[str, Any], dict[str, torch.Tensor]], None]:
    return lambda raw, weights: weights.__setitem__(new, weights.pop(old))


def spoil(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., None]:
    return lambda raw, weights: weights.__setitem__(name, value(weights[name]))


def nan(tensor: torch.Tensor) -> torch.Tensor:
    out = tensor.clone()
    out.view(-1)[-1] = torch.nan
    return out


def all_of(*edits: Callable[..., Any]) -> Callable[..., None]:
    def edit(raw: Any, weights: Any) -> None:
        for each in edits:
            each(raw, weights)

    return edit


TAPS = "dflash_config.target_layer_ids"
Q = "layers.1.self_attn.q_proj.weight"
ZLAB = [
    # Layer ids; those of the released drafters' formula are known to be shifted even without the target.
    Fault("taps counted as speculators counts", TAPS, put("dflash_config", "target_layer_ids", to=[2, 4, 6])),
    Fault("taps one too low", TAPS, put("dflash_config", "target_layer_ids", to=[0, 2, 4]), True),
    Fault("taps in another order", TAPS, put("dflash_config", "target_layer_ids", to=[3, 1, 5]), True),
    Fault("last layer tapped", TAPS, put("dflash_config", "target_layer_ids", to=[1, 3, 7])),
    Fault("tap beyond the target", TAPS, put("dflash_config", "target_layer_ids", to=[1, 3, 8])),
    Fault("embedding's output tapped", TAPS, put("dflash_config", "target_layer_ids", to=[-1, 3, 5])),
    Fault("a layer tapped twice", TAPS, put("dflash_config", "target_layer_ids", to=[1, 3, 3])),
    Fault("no taps", TAPS, drop("dflash_config", "target_layer_ids")),
    Fault("fewer taps than fc reads", "fc.weight", put("dflash_config", "target_layer_ids", to=[1, 3])),
    Fault("no depth", "num_target_layers", drop("num_target_layers")),
    Fault("another depth", "num_target_layers", put("num_target_layers", to=9), True),
    Fault("two depths", "num_target_layers", put("dflash_config", "num_target_layers", to=9)),
    # Mask and attention
    Fault("causal block", "dflash_config.causal", put("dflash_config", "causal", to=True)),
    Fault("causal block, other key", "is_causal", put("is_causal", to=True)),
    Fault("sliding layers", "layer_types", put("layer_types", to=["full_attention", "sliding_attention"])),
    Fault("too few layer types", "layer_types", put("layer_types", to=["full_attention"])),
    Fault("no layer types", "layer_types", drop("layer_types")),
    Fault("sliding window", "sliding_window", put("sliding_window", to=4096)),
    Fault("sliding window switched on", "use_sliding_window", put("use_sliding_window", to=True)),
    Fault("sliding window, vLLM's key", "dflash_config.use_swa", put("dflash_config", "use_swa", to=True)),
    Fault("attention bias", "attention_bias", put("attention_bias", to=True)),
    Fault("another activation", "hidden_act", put("hidden_act", to="gelu")),
    # Rotary embedding
    Fault("no top-level rope_theta", "rope_theta", drop("rope_theta")),
    Fault("two rope bases", "rope_theta", put("rope_parameters", "rope_theta", to=1e6)),
    Fault(
        "another base than the target's",
        "rope_theta",
        all_of(put("rope_theta", to=1e6), put("rope_parameters", "rope_theta", to=1e6)),
        True,
    ),
    Fault("scaled rope", "rope_scaling", put("rope_scaling", to={"rope_type": "yarn", "factor": 4.0})),
    Fault("scaled rope, new key", "rope_parameters", put("rope_parameters", "rope_type", to="yarn")),
    Fault("part of the head rotated", "partial_rotary_factor", put("partial_rotary_factor", to=0.5)),
    Fault("interleaved rotation", "is_neox_style", put("is_neox_style", to=False)),
    # Vocabulary and mask token
    Fault("padded vocabulary", "vocab_size", put("vocab_size", to=320), True),
    Fault("mask id that no row has", "mask_token_id", put("dflash_config", "mask_token_id", to=270)),
    Fault("negative mask id", "mask_token_id", put("dflash_config", "mask_token_id", to=-1)),
    Fault("another mask id", "mask_token_id", put("dflash_config", "mask_token_id", to=257), True),
    Fault("a mask id in words", "mask_token_id", put("dflash_config", "mask_token_id", to="258")),
    Fault("a layer id in words", TAPS, put("dflash_config", "target_layer_ids", to=[1, "3", 5])),
    Fault("a block size in words", "block_size", put("block_size", to="16")),
    Fault("no mask id", "dflash_config.mask_token_id", drop("dflash_config", "mask_token_id")),
    Fault("tied embeddings", "tie_word_embeddings", put("tie_word_embeddings", to=True)),
    Fault(
        "scaled embedding",
        "dflash_config.input_embedding_scale",
        put("dflash_config", "input_embedding_scale", to=8.0),
        True,
    ),
    Fault(
        "capped logits",
        "dflash_config.final_logit_softcapping",
        put("dflash_config", "final_logit_softcapping", to=30.0),
        True,
    ),
    # Block
    Fault("no block size at the top", "block_size", drop("block_size")),
    Fault("two block sizes", "block_size", put("dflash_config", "block_size", to=16)),
    Fault("a block of one", "block_size", all_of(put("block_size", to=1), put("dflash_config", "block_size", to=1))),
    # Kind of model
    Fault("another architecture", "architectures", put("architectures", to=["Qwen3ForCausalLM"])),
    Fault("DeepSpec's drafter", "architectures", put("architectures", to=["Qwen3DSparkModel"])),
    Fault("a model type vLLM cannot resolve", "model_type", put("model_type", to="qwen3_5_text")),
    Fault("no dflash_config", "dflash_config", drop("dflash_config")),
    Fault("remote code that is not there", "auto_map", put("auto_map", to={"AutoModel": "dflash.DFlashDraftModel"})),
    # Sizes
    Fault("no head_dim", "head_dim", drop("head_dim")),
    Fault("another head_dim", Q, put("head_dim", to=16)),
    Fault("another number of key heads", "layers.0.self_attn.k_proj.weight", put("num_key_value_heads", to=4)),
    Fault("another hidden size", "hidden_size", put("hidden_size", to=64), True),
    Fault("another depth of the drafter", "layers.2.mlp.up_proj.weight", put("num_hidden_layers", to=3)),
    # Tensors
    Fault("a tensor left out", Q, lambda raw, weights: weights.pop(Q)),
    Fault(
        "a misspelt tensor", "layers.1.self_attn.query_proj.weight", rename(Q, "layers.1.self_attn.query_proj.weight")
    ),
    Fault("a prefix", "model.norm.weight", rename("norm.weight", "model.norm.weight")),
    Fault("TorchSpec's name of fc", "context_proj.weight", rename("fc.weight", "context_proj.weight")),
    Fault("TorchSpec's name of the norm", "context_norm.weight", rename("hidden_norm.weight", "context_norm.weight")),
    Fault(
        "a trained mask embedding",
        "mask_hidden",
        lambda raw, weights: weights.update(mask_hidden=torch.zeros(32).bfloat16()),
    ),
    Fault(
        "an embedding",
        "embed_tokens.weight",
        lambda raw, weights: weights.update({"embed_tokens.weight": torch.zeros(270, 32).bfloat16()}),
    ),
    Fault("a sketch in fc", "fc.weight", spoil("fc.weight", lambda t: t[:, :40].contiguous())),
    Fault("NaN", "fc.weight", spoil("fc.weight", nan)),
    Fault("infinity", "norm.weight", spoil("norm.weight", lambda t: t / 0)),
    Fault(
        "stored otherwise than said",
        "dtype",
        lambda raw, weights: weights.update({n: t.float() for n, t in weights.items()}),
    ),
    Fault("two precisions", "dtype", spoil("norm.weight", torch.Tensor.float)),
    Fault("integers", "dtype", spoil("norm.weight", torch.Tensor.int)),
]

AUX, INNER = "aux_hidden_state_layer_ids", "transformer_layer_config"
SPECULATORS = [
    Fault("taps counted as z-lab counts", AUX, put(AUX, to=[1, 3, 5])),
    Fault("last layer tapped", AUX, put(AUX, to=[2, 4, 8])),
    Fault("embedding's output tapped", AUX, put(AUX, to=[0, 4, 6])),
    Fault("no taps", AUX, put(AUX, to=None)),
    Fault("vLLM's causal flag off", "sliding_window_non_causal", put("sliding_window_non_causal", to=False)),
    Fault("vLLM's causal flag left out", "sliding_window_non_causal", drop("sliding_window_non_causal")),
    Fault("drafts from the anchor", "sample_from_anchor", put("sample_from_anchor", to=True)),
    Fault("another kind", "speculators_model_type", put("speculators_model_type", to="eagle3")),
    Fault("another architecture", "architectures", put("architectures", to=["LlamaForCausalLM"])),
    Fault("no body", INNER, drop(INNER)),
    Fault("another body", f"{INNER}.model_type", put(INNER, "model_type", to="llama")),
    Fault("no rope_theta", f"{INNER}.rope_theta", drop(INNER, "rope_theta")),
    Fault("scaled rope", f"{INNER}.rope_parameters", put(INNER, "rope_parameters", "rope_type", to="yarn")),
    Fault("sliding layers", f"{INNER}.layer_types", put(INNER, "layer_types", to=["sliding_attention"] * 2)),
    Fault("no head_dim", f"{INNER}.head_dim", drop(INNER, "head_dim")),
    Fault("padded vocabulary", "vocab_size", put(INNER, "vocab_size", to=320), True),
    Fault("speculators' default of draft_vocab_size", "draft_vocab_size", put("draft_vocab_size", to=32000)),
    Fault("no draft_vocab_size", "draft_vocab_size", drop("draft_vocab_size")),
    Fault("mask id that no row has", "mask_token_id", put("mask_token_id", to=270)),
    Fault(
        "one slot too many",
        "speculative_tokens",
        put("speculators_config", "proposal_methods", 0, "speculative_tokens", to=6),
    ),
    Fault(
        "no such method", "default_proposal_method", put("speculators_config", "default_proposal_method", to="sample")
    ),
    Fault("another algorithm", "speculators_config.algorithm", put("speculators_config", "algorithm", to="eagle3")),
    Fault("no verifier", "speculators_config.verifier", drop("speculators_config", "verifier")),
    Fault("no speculators_config", "speculators_config", drop("speculators_config")),
    Fault("embedding never filled", "embed_tokens.weight", spoil("embed_tokens.weight", lambda t: t * torch.nan)),
    Fault("head never filled", "lm_head.weight", spoil("lm_head.weight", nan)),
    Fault("no embedding", "embed_tokens.weight", lambda raw, weights: weights.pop("embed_tokens.weight")),
    Fault("another target's embedding", "embed_tokens.weight", spoil("embed_tokens.weight", lambda t: t.flip(0)), True),
    Fault("another target's head", "lm_head.weight", spoil("lm_head.weight", lambda t: t.flip(0)), True),
    Fault("the verifier's own head", "verifier_lm_head.weight", rename("lm_head.weight", "verifier_lm_head.weight")),
    Fault(
        "reduced head without its tables",
        "d2t",
        all_of(put("draft_vocab_size", to=100), spoil("lm_head.weight", lambda t: t[:100].clone())),
    ),
]


def fields(directory, target=None) -> set[str]:
    return {problem.field for problem in check_directory(directory, target).problems}


@pytest.mark.parametrize("fault", ZLAB, ids=lambda fault: fault.name)
def test_a_fault_in_zlab_layout_is_caught(zlab, facts, fault):
    directory = change(zlab, fault.edit)
    assert fault.field in fields(directory, facts)
    # Without the target, the check says what it can: nothing about faults that only the target shows.
    assert (fault.field in fields(directory)) != fault.needs_target


@pytest.mark.parametrize("fault", SPECULATORS, ids=lambda fault: fault.name)
def test_a_fault_in_speculators_layout_is_caught(speculators, facts, fault):
    directory = change(speculators, fault.edit)
    assert fault.field in fields(directory, facts)
    assert (fault.field in fields(directory)) != fault.needs_target


def test_sound_directories_have_no_problem(sound_zlab, sound_speculators, facts):
    for directory in (sound_zlab, sound_speculators):
        for target in (None, facts):
            assert check_directory(directory, target).problems == ()


def test_missing_metadata_is_a_problem(zlab):
    assert fields(change(zlab, lambda raw, weights: None, made="by hand")) == {"metadata"}


def test_a_mask_embedding_beside_the_weights_is_a_problem(zlab, tmp_path, capsys):
    torch.save(torch.zeros(32), zlab / "mask_embedding.pt")
    assert fields(zlab) == {"mask_embedding.pt"}
    assert "mask_embedding.pt found" in refused(capsys, "import", zlab, f"--out={tmp_path / 'ours'}")


def test_every_problem_says_what_was_found_expected_and_what_happens(zlab, facts):
    change(zlab, put("dflash_config", "target_layer_ids", to=[2, 4, 6]))
    (problem,) = check_directory(zlab, facts).problems
    assert str(problem) == (
        "dflash_config.target_layer_ids: [2, 4, 6] found, [1, 3, 5], the taps of the tiny target expected; "
        "a shift by one costs 2 to 5 % of tau"
    )


@pytest.mark.parametrize(
    ("spoilt", "field"),
    [
        (lambda t: t | {"d2t": t["d2t"] + torch.arange(len(t["d2t"]))}, "d2t"),
        (lambda t: t | {"d2t": t["d2t"].flip(0)}, "d2t"),
        (lambda t: t | {"t2d": ~t["t2d"]}, "t2d"),
        (lambda t: t | {"d2t": t["d2t"].int()}, "d2t, t2d"),
        (lambda t: {n: v for n, v in t.items() if n != "t2d"}, "t2d"),
    ],
    ids=["ids for offsets", "another order", "the other ids", "32 bits", "one table alone"],
)
def test_faults_of_a_reduced_head_are_caught(drafter, facts, vocabulary, tmp_path, spoilt, field):
    reduced = vocabulary.restrict(torch.arange(3, 260, 2))
    export_speculators(drafter, tmp_path / "s", target=facts, vocabulary=reduced)
    assert check_directory(tmp_path / "s", facts).problems == ()

    def edit(raw, weights):
        changed = spoilt(dict(weights))
        weights.clear()
        weights.update(changed)

    assert field in fields(change(tmp_path / "s", edit), facts)
