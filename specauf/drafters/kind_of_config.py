"""What a drafter's config.json says of it at a look, before it is read."""

from typing import Any

OWN_FIELDS = {
    "dflash2": ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k"),
    "dspark": ("markov_rank", "markov_head_type", "enable_confidence_head", "confidence_head_with_markov"),
}
"""Fields by which a kind is known that `projector_type` does not name."""


def zlab_kind(raw: dict[str, Any]) -> str:
    """Which kind of drafter a z-lab style `config.json` is of: what `projector_type` says, or whose fields it has."""
    inner = raw.get("dflash_config") or {}
    if inner.get("projector_type"):
        return str(inner["projector_type"])
    for kind, names in OWN_FIELDS.items():
        if any(inner.get(name, raw.get(name)) is not None for name in names):
            return kind
    return "dflash"


def drafted(raw: dict[str, Any]) -> int:
    """Tokens that a block drafts by a drafter's config.json of any layout; the anchor's slot may be one of them."""
    return int(raw["block_size"]) + 1 - shortest(raw)


def shortest(raw: dict[str, Any]) -> int:
    """The least `block_size` that drafts a token."""
    # Where z-lab's layout does not say it, servers take true for DSpark.
    default = zlab_kind(raw) == "dspark" and "speculators_model_type" not in raw
    return 1 if raw.get("sample_from_anchor", default) is True else 2
