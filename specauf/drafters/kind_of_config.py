"""What a drafter's config.json says of it at a look, before it is read."""

from typing import Any


def zlab_kind(raw: dict[str, Any]) -> str:
    """Which kind of drafter a z-lab style `config.json` is of: what `projector_type` says, or whose fields it has."""
    inner = raw.get("dflash_config") or {}
    if inner.get("projector_type"):
        return str(inner["projector_type"])
    owners = {"selector_rank": "dflash2", "markov_rank": "dspark"}
    kinds = (kind for name, kind in owners.items() if inner.get(name, raw.get(name)) is not None)
    return next(kinds, "dflash")


def drafted(raw: dict[str, Any]) -> int:
    """Tokens that a block drafts by a drafter's config.json of any layout; the anchor's slot may be one of them."""
    return int(raw["block_size"]) + 1 - shortest(raw)


def shortest(raw: dict[str, Any]) -> int:
    """The least `block_size` that drafts a token."""
    # Where z-lab's layout does not say it, servers take true for DSpark.
    default = zlab_kind(raw) == "dspark" and "speculators_model_type" not in raw
    return 1 if raw.get("sample_from_anchor", default) is True else 2
