"""z-lab's layout: what z-lab's own package, SGLang, vLLM and llama.cpp's converter read."""

from pathlib import Path
from typing import Any

import torch

from specauf.drafters import DFlashDrafter, Drafter
from specauf.errors import UserError
from specauf.export.card import About, card
from specauf.export.check import Checked, require_sound
from specauf.export.directory import CARD, new_directory, read_config, write_config
from specauf.export.facts import TargetFacts


def export_zlab(
    drafter: Drafter,
    directory: Path | str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    target: TargetFacts | None = None,
    about: About | None = None,
) -> Checked:
    """Write a drafter in z-lab's layout, check what was written, and only then let it appear under its name.

    Args:
        drafter: a DFlash drafter over raw features (a sketch folded in).
        directory: must not exist.
        dtype: of the stored weights.
        target: what is known of its target; checked against, and the source of Gemma's embedding scale.
        about: what the model card says.

    Returns:
        What the check found.

    Raises:
        UserError: no server runs this drafter, the directory exists, or a check fails.
    """
    ready = servable(drafter)
    with new_directory(Path(directory)) as draft:
        ready.save_pretrained(draft, dtype=dtype)
        # The target's own, over the drafter's: Gemma rounds its scale to the embedding's type, which only it knows.
        extras = vocabulary_fields(target)
        if extras:
            config = read_config(draft)
            config["dflash_config"] |= extras
            write_config(draft, config)
        (draft / CARD).write_text(card("zlab", Path(directory).name, read_config(draft), about or About()))
        return require_sound(draft, target)


def servable(drafter: Drafter) -> DFlashDrafter:
    """The drafter, if a server can run it.

    Raises:
        UserError: naming what can run it instead.
    """
    if type(drafter) is not DFlashDrafter:
        raise UserError(
            f"drafter {drafter.name}: no server reads this kind, dflash expected; `specauf evaluate` and "
            "specauf.decoding decode with it"
        )
    if not drafter.servable:
        raise UserError(
            f"fc: reads a sketch of {drafter.config.feature_dim} numbers, {drafter.config.raw_feature_dim} raw "
            "features expected by servers; export from the run directory or checkpoint, which hold the sketch's basis"
        )
    return drafter


def vocabulary_fields(target: TargetFacts | None) -> dict[str, Any]:
    """Fields by which z-lab's package embeds and caps as the target does (Gemma); empty for all other families."""
    if target is None:
        return {}
    fields = {"input_embedding_scale": target.embedding_scale, "final_logit_softcapping": target.logit_softcap}
    return {name: value for name, value in fields.items() if value not in (None, 1.0)}
