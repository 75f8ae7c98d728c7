"""Drafters of others that this code would run otherwise than their servers do."""

from collections.abc import Sequence
from typing import Any

from specauf.errors import UserError

_OBJECTS = (
    "dflash_config",
    "full_attention",
    "rope_parameters",
    "rope_scaling",
    "speculators_config",
    "transformer_layer_config",
)
_LISTS = ("aux_hidden_state_layer_ids", "layer_types")
_NUMBERS = (
    "rope_theta",
    "rms_norm_eps",
    "max_position_embeddings",
    "initializer_range",
    "partial_rotary_factor",
    "input_embedding_scale",
    "final_logit_softcapping",
)


def require_structure(raw: dict[str, Any]) -> None:
    """Stop at a field of a drafter's config.json that should be an object or a list, and is something else.

    Raises:
        UserError: naming the first one.
    """
    _require(raw, _OBJECTS, dict, "an object")
    _require(raw, _LISTS, list, "a list")
    for name in _OBJECTS:
        if isinstance(raw.get(name), dict):
            require_structure(raw[name])


def require_numbers(raw: dict[str, Any]) -> None:
    """Stop at a field of a drafter's config.json that should be a number, and is something else.

    Raises:
        UserError: naming the first one.
    """
    _require(raw, _NUMBERS, (int, float), "a number")
    for name in _OBJECTS:
        if raw.get(name):
            require_numbers(raw[name])


def _require(raw: dict[str, Any], names: Sequence[str], kind: type | tuple[type, ...], expected: str) -> None:
    """Null says the same as nothing."""
    for name in names:
        value = raw.get(name)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise UserError(f"{name}: {value!r} in the drafter's config.json, {expected} expected")


def refuse_other_architectures(raw: dict[str, Any]) -> None:
    """Stop at the fields of a drafter's config.json whose effect on the forward pass this code does not have.

    Raises:
        UserError: naming the first one.
    """
    rope = raw.get("rope_parameters") or {}
    scaling = raw.get("rope_scaling") or ({} if rope.get("rope_type", "default") == "default" else rope)
    inner = raw.get("dflash_config") or {}
    windowed = raw.get("use_sliding_window") and not raw.get("layer_types")
    checks = {
        "attention_bias": (raw.get("attention_bias", False), False),
        "hidden_act": (raw.get("hidden_act", "silu"), "silu"),
        "causal": (inner.get("causal") or False, False),
        "is_causal": (raw.get("is_causal") or False, False),
        "use_swa": (inner.get("use_swa") or False, False),
        "use_sliding_window": (windowed or False, False),
        "is_neox_style": (raw.get("is_neox_style") is not False, True),
        "rope_is_neox_style": (raw.get("rope_is_neox_style") is not False, True),
        "partial_rotary_factor": (raw.get("partial_rotary_factor") or rope.get("partial_rotary_factor") or 1.0, 1.0),
        "rope_scaling": (scaling or None, None),
        "sample_from_anchor": (raw.get("sample_from_anchor", False), False),
        "layer_types": (set(map(str, raw.get("layer_types") or ["full_attention"])), {"full_attention"}),
    }
    for name, (found, expected) in checks.items():
        if found != expected:
            raise UserError(
                f"{name}: {found} in the drafter's config.json, {expected} expected; this drafter is not supported"
            )
