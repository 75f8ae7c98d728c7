"""What a target's config says of rotary frequencies that change with the length of the text."""

from typing import Any


def frequencies_stay(text_config: Any) -> tuple[str, int] | None:
    """Kind of rope, and the tokens up to which its frequencies stay; None where they always do, or nothing is said.

    transformers chooses those of LongRoPE and dynamic NTK by the longest position of a pass, for its whole batch.
    """
    rope = getattr(text_config, "rope_parameters", None) or {}
    tokens = rope.get("original_max_position_embeddings") or getattr(text_config, "max_position_embeddings", None)
    kind = rope.get("rope_type")
    return (kind, int(tokens)) if kind in ("longrope", "dynamic") and tokens else None
