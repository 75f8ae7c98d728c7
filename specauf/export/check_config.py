"""What the servers need of a drafter's config.json, each rule with what happens when it is broken."""

import math
from collections.abc import Iterator
from typing import Any

from specauf.drafters import DFlash2Config, DrafterConfig, DSparkConfig
from specauf.drafters.kind_of_config import drafted, shortest
from specauf.export import check_heads
from specauf.export.facts import TargetFacts
from specauf.export.problem import MISSING, Problem

_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
)


def zlab(raw: dict[str, Any], target: TargetFacts | None) -> Iterator[Problem]:
    """Problems of a z-lab config."""
    kind = check_heads.kind_of(raw)
    if raw.get("architectures") != [kind.architecture]:
        why = "vLLM, SGLang and llama.cpp choose the code by it"
        yield Problem("architectures", raw.get("architectures") or MISSING, [kind.architecture], why)
    inner = raw.get("dflash_config")
    if not isinstance(inner, dict):
        yield Problem(
            "dflash_config", inner or MISSING, "an object", "z-lab's loader and llama.cpp's converter read it"
        )
        inner = {}
    for name in ("mask_token_id", "target_layer_ids"):
        if inner.get(name) is None:
            yield Problem(f"dflash_config.{name}", MISSING, "a value", "servers guess it or refuse")
    if raw.get("block_size") is None:
        yield Problem("block_size", MISSING, inner.get("block_size"), "llama.cpp's converter takes 16 instead")
    elif inner.get("block_size", raw["block_size"]) != raw["block_size"]:
        found = f"{raw['block_size']} at the top, {inner['block_size']} in dflash_config"
        yield Problem("block_size", found, "the same in both", "servers read the one or the other")
    # vLLM runs full attention without a mask when neither key is there.
    for name, value in (("dflash_config.causal", inner.get("causal")), ("is_causal", raw.get("is_causal"))):
        if value:
            yield Problem(name, value, False, "vLLM and z-lab's package would mask the later slots of a block")
    if inner.get("use_swa"):
        yield Problem("dflash_config.use_swa", inner["use_swa"], False, "vLLM would cut every layer to a window")
    depth = raw.get("num_target_layers")
    if inner.get("num_target_layers", depth) != depth:
        found = f"{depth} at the top, {inner['num_target_layers']} in dflash_config"
        yield Problem("num_target_layers", found, "the same in both", "SGLang reads the inner one, z-lab the other")
    if not isinstance(depth, int):
        yield Problem("num_target_layers", depth or MISSING, "the target's depth", "z-lab's and SGLang's loaders fail")
    if kind is DSparkConfig:
        yield from check_heads.dspark(raw, "")
        yield from check_heads.dspark(inner, "dflash_config.")
        for name in DSparkConfig.own:
            if raw.get(name) != inner.get(name):
                found = f"{raw.get(name)} at the top, {inner.get(name)} in dflash_config"
                yield Problem(name, found, "the same in both", "vLLM reads the former, SGLang the latter")
        yield from check_heads.first_slot(raw, default=True)
        if inner.get("projector_type") != kind.kind:
            found = inner.get("projector_type", MISSING)
            yield Problem("dflash_config.projector_type", found, kind.kind, "SpecForge refuses it")
    elif kind is DFlash2Config:
        yield from check_heads.dflash2(inner, raw, raw.get("block_size"), "dflash_config.")
    elif inner.get("projector_type") is not None:
        yield from check_heads.domino(inner)
    yield from _body(raw, "")
    yield from _block(raw.get("block_size"), inner.get("mask_token_id"), raw.get("vocab_size"), shortest(raw))
    taps = inner.get("target_layer_ids")
    if isinstance(taps, list):
        yield from _taps(taps, depth, "dflash_config.target_layer_ids", 0, target)
    yield from _against_target(raw, inner.get("mask_token_id"), depth, target)
    if target is not None:
        for name, wanted in (
            ("input_embedding_scale", None if target.embedding_scale == 1.0 else target.embedding_scale),
            ("final_logit_softcapping", target.logit_softcap),
        ):
            if not _same(inner.get(name, raw.get(name)), wanted):
                why = "z-lab's package would embed or cap otherwise than the target"
                yield Problem(
                    f"dflash_config.{name}", inner.get(name, raw.get(name)) or MISSING, wanted or MISSING, why
                )


def speculators(raw: dict[str, Any], target: TargetFacts | None) -> Iterator[Problem]:
    """Problems of a speculators config."""
    found = raw.get("speculators_model_type")
    kind = check_heads.kind_of(raw)
    if kind is DrafterConfig:
        kind = {other.kind: other for other in (DFlash2Config, DSparkConfig)}.get(str(found), kind)
    if found != kind.kind:
        yield Problem("speculators_model_type", found, kind.kind, "speculators and vLLM choose the code by it")
    if raw.get("architectures") != [kind.architecture]:
        yield Problem("architectures", raw.get("architectures") or MISSING, [kind.architecture], "the saved class")
    if raw.get("sliding_window_non_causal") is not True:
        why = "vLLM would make full attention causal inside the block (its issue 56692)"
        yield Problem("sliding_window_non_causal", raw.get("sliding_window_non_causal", MISSING), True, why)
    if kind is DSparkConfig:
        yield from check_heads.first_slot(raw, default=None)
    elif raw.get("sample_from_anchor", False) is not False:
        yield Problem("sample_from_anchor", raw["sample_from_anchor"], False, "vLLM refuses it for dflash")
    inner = raw.get("transformer_layer_config")
    if not isinstance(inner, dict):
        yield Problem(
            "transformer_layer_config", MISSING, "the drafter's Qwen3 config", "defaults of an 8B model apply"
        )
        inner = {}
    if inner.get("model_type") != "qwen3":
        found = inner.get("model_type") or MISSING
        yield Problem("transformer_layer_config.model_type", found, "qwen3", "vLLM builds the layers by it")
    yield from _body(inner, "transformer_layer_config.")
    yield from _block(raw.get("block_size"), raw.get("mask_token_id"), inner.get("vocab_size"), shortest(raw))
    draft, vocabulary = raw.get("draft_vocab_size"), inner.get("vocab_size")
    if not isinstance(draft, int) or (isinstance(vocabulary, int) and not 0 < draft <= vocabulary):
        why = "the head's rows; speculators' default is 32,000"
        yield Problem("draft_vocab_size", draft or MISSING, f"1 to {vocabulary}", why)
    if kind is DFlash2Config:
        yield from check_heads.dflash2(raw, inner, raw.get("block_size"), "")
        if draft != vocabulary:
            why = "speculators and vLLM read DFlash 2 with the whole head alone"
            yield Problem("draft_vocab_size", draft or MISSING, vocabulary, why)
    if kind is DSparkConfig:
        yield from check_heads.dspark(raw, "")
        if raw.get("markov_head_type") not in (None, "vanilla"):
            why = "vLLM has no other, SGLang reads z-lab's layout"
            yield Problem("markov_head_type", raw["markov_head_type"], "vanilla", why)
    yield from _proposal(raw, kind.kind)
    depth, aux = raw.get("num_target_layers"), raw.get("aux_hidden_state_layer_ids")
    if isinstance(aux, list) and aux:
        yield from _taps(
            [i - 1 if isinstance(i, int) else i for i in aux], depth, "aux_hidden_state_layer_ids", 1, target
        )
    else:
        yield Problem("aux_hidden_state_layer_ids", aux or MISSING, "z-lab's layer ids + 1", "vLLM captures these")
    yield from _against_target(inner, raw.get("mask_token_id"), depth, target)


def _same(found: Any, wanted: Any) -> bool:
    """Equal, or numbers that bfloat16 does not tell apart: Gemma rounds its embedding scale to the type it runs in."""
    if isinstance(found, int | float) and isinstance(wanted, int | float):
        return math.isclose(found, wanted, rel_tol=2**-8)
    return bool(found == wanted)


def lenient(raw: dict[str, Any]) -> dict[str, Any]:
    """The config with what does not decide shapes made harmless, so that shapes can be checked all the same."""
    given = raw.get("dflash_config")
    inner: dict[str, Any] = given if isinstance(given, dict) else {}
    taps = inner.get("target_layer_ids") or raw.get("target_layer_ids") or []
    sizes = {name: raw[name] for name in _SIZES if name in raw}
    heads = ("projector_type", "gru_hidden_dim", "emb_dim", *DFlash2Config.own, *DSparkConfig.own)
    head = {name: inner.get(name, raw.get(name)) for name in heads if name in inner or name in raw}
    if "markov_rank" in head:
        head["confidence_head_with_markov"] = True
    harmless = {"mask_token_id": 0, "target_layer_ids": list(range(len(taps))), "pure_draft_prefix_len": 0}
    return sizes | {
        "block_size": 1 << 30,  # no convolution is longer
        "sample_from_anchor": False,
        "num_target_layers": len(taps) + 2,
        "rope_theta": 1.0,
        "dflash_config": head | harmless,
    }


def _body(config: dict[str, Any], prefix: str) -> Iterator[Problem]:
    """Fields of the Qwen3 body, common to both layouts."""
    if config.get("model_type") != "qwen3" and not prefix:
        yield Problem("model_type", config.get("model_type") or MISSING, "qwen3", "vLLM cannot resolve another one")
    for name in _SIZES:
        if not isinstance(config.get(name), int) or config[name] < 1:
            yield Problem(prefix + name, config.get(name) or MISSING, "a number", "a default of transformers applies")
    layers = config.get("num_hidden_layers")
    kinds = config.get("layer_types")
    if isinstance(layers, int) and kinds != ["full_attention"] * layers:
        why = "sliding layers are causal in servers, and z-lab's loader indexes the list"
        yield Problem(prefix + "layer_types", kinds or MISSING, f"{layers} x full_attention", why)
    expected = {
        "sliding_window": None,
        "use_sliding_window": False,
        "attention_bias": False,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "rope_scaling": None,
    }
    for name, value in expected.items():
        found = config.get(name, value)
        if found != value:
            yield Problem(prefix + name, found, value, "servers run another drafter than was trained")
    yield from _rope(config, prefix)


def _rope(config: dict[str, Any], prefix: str) -> Iterator[Problem]:
    rope = config.get("rope_parameters") or {}
    theta = config.get("rope_theta")
    if not isinstance(theta, int | float):
        why = "SGLang and llama.cpp fall back to 10000; transformers 5 alone writes it elsewhere"
        yield Problem(prefix + "rope_theta", theta or MISSING, rope.get("rope_theta", "a number"), why)
    elif "rope_theta" in rope and rope["rope_theta"] != theta:
        found = f"{theta}, and {rope['rope_theta']} in rope_parameters"
        yield Problem(prefix + "rope_theta", found, "the same in both", "servers read the one or the other")
    if rope.get("rope_type", "default") != "default":
        yield Problem(prefix + "rope_parameters", rope["rope_type"], "default", "drafters run unscaled")
    partial = config.get("partial_rotary_factor") or rope.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        yield Problem(prefix + "partial_rotary_factor", partial, 1.0, "trained with rotation over the whole head")
    for name in ("is_neox_style", "rope_is_neox_style"):
        if config.get(name) is False:
            yield Problem(prefix + name, False, "true or no entry", "vLLM and SGLang would rotate interleaved pairs")


def _block(size: Any, mask: Any, vocabulary: Any, least: int) -> Iterator[Problem]:
    for name, value in (("block_size", size), ("mask_token_id", mask)):
        if value is not None and not isinstance(value, int):
            yield Problem(name, repr(value), "a whole number", "servers fail on it")
    if isinstance(size, int) and size < least:
        yield Problem("block_size", size, f"at least {least}", "it would draft nothing")
    if isinstance(mask, int) and isinstance(vocabulary, int) and not 0 <= mask < vocabulary:
        why = "the target ships no embedding row of that number"
        yield Problem("mask_token_id", mask, f"0 to {vocabulary - 1}", why)


def _taps(taps: list[Any], depth: Any, field: str, offset: int, target: TargetFacts | None) -> Iterator[Problem]:
    """Layer ids, as z-lab counts them; `offset` brings them back to how the field does."""
    if not all(isinstance(tap, int) for tap in taps):
        yield Problem(field, taps, "whole numbers", "servers fail on them")
        return
    shown = [tap + offset for tap in taps]
    layers = target.num_hidden_layers if target is not None else depth
    if len(set(taps)) != len(taps):
        yield Problem(field, shown, "each layer once", "fc reads one layer twice")
    if isinstance(layers, int):
        if layers - 1 in taps:
            why = "the last layer is normed in transformers and not in servers"
            yield Problem(field, shown, f"at most {layers - 2 + offset}", why)
        elif not all(0 <= tap < layers for tap in taps):
            yield Problem(field, shown, f"{offset} to {layers - 2 + offset}", "the target has no such layer")
        elif target is None or target.taps is None:
            yield from _shifted(taps, layers, field, shown, offset)
    elif any(tap < 0 for tap in taps):
        yield Problem(field, shown, f"at least {offset}", "layer ids count from there")
    if target is not None and target.taps is not None and tuple(taps) != target.taps:
        wanted = [tap + offset for tap in target.taps]
        yield Problem(field, shown, f"{wanted}, the taps of {target.where}", "a shift by one costs 2 to 5 % of tau")


def _shifted(taps: list[int], layers: int, field: str, shown: list[int], offset: int) -> Iterator[Problem]:
    """The released drafters' formula, but counted by the other layout's convention."""
    count = len(taps)
    if count < 2:
        return
    usual = [round(1 + i * (layers - 4) / (count - 1)) for i in range(count)]
    wrong = [tap + (-1 if offset else 1) for tap in usual]
    if taps == wrong:
        why = "these are the usual layers shifted by one, as the other layout counts"
        yield Problem(field, shown, [tap + offset for tap in usual], why)


def _against_target(body: dict[str, Any], mask: Any, depth: Any, target: TargetFacts | None) -> Iterator[Problem]:
    if target is None:
        return
    pairs = (
        ("hidden_size", body.get("hidden_size"), target.hidden_size, "embedding and head are the target's"),
        ("vocab_size", body.get("vocab_size"), target.vocab_size, "vLLM accepts nothing with another vocabulary"),
        ("num_target_layers", depth, target.num_hidden_layers, "the layer ids mean another depth"),
        ("rope_theta", body.get("rope_theta"), target.rope_theta, "drafters are trained with the target's base"),
        ("mask_token_id", mask, target.mask_token_id, "the drafter was trained with that row"),
    )
    for name, found, wanted, why in pairs:
        if found is not None and wanted is not None and found != wanted:
            yield Problem(name, found, f"{wanted}, as {target.where} has it", why)


def _proposal(raw: dict[str, Any], kind: str) -> Iterator[Problem]:
    about = raw.get("speculators_config")
    if not isinstance(about, dict):
        yield Problem("speculators_config", about or MISSING, "an object", "vLLM reads the method from it")
        return
    if about.get("algorithm") != kind:
        yield Problem("speculators_config.algorithm", about.get("algorithm"), kind, "speculators names the kind there")
    methods = {m.get("proposal_type"): m for m in about.get("proposal_methods") or [] if isinstance(m, dict)}
    chosen = methods.get(str(about.get("default_proposal_method")))
    size = raw.get("block_size")
    if chosen is None:
        yield Problem("default_proposal_method", about.get("default_proposal_method"), list(methods), "vLLM refuses it")
    elif isinstance(size, int) and chosen.get("speculative_tokens") != drafted(raw):
        why = "what a block of the drafter drafts"
        yield Problem("speculative_tokens", chosen.get("speculative_tokens"), drafted(raw), why)
    if not isinstance(about.get("verifier"), dict):
        yield Problem("speculators_config.verifier", MISSING, "an object", "speculators refuses the config")
