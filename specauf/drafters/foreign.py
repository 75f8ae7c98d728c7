"""Drafters of others that this code would run otherwise than their servers do."""

from typing import Any

from specauf.errors import UserError


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
        "layer_types": (set(raw.get("layer_types") or ["full_attention"]), {"full_attention"}),
    }
    for name, (found, expected) in checks.items():
        if found != expected:
            raise UserError(
                f"{name}: {found} in the drafter's config.json, {expected} expected; this drafter is not supported"
            )
