"""z-lab's layout: what its own package, SGLang, vLLM and llama.cpp's converter read, of each kind some of them."""

from pathlib import Path
from typing import Any

import torch

from specauf.drafters import DFlash2Drafter, DFlashDrafter, DominoDrafter, Drafter, DSparkDrafter
from specauf.errors import UserError
from specauf.export.card import About, Layout, card
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
        drafter: a DFlash, DFlash 2, DSpark or Domino drafter over raw features (a sketch folded in).
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
        config = read_config(draft)
        # The target's own, over the drafter's: Gemma rounds its scale to the embedding's type, which only it knows.
        config["dflash_config"] |= vocabulary_fields(target)
        if isinstance(ready, DominoDrafter):
            # SpecForge has another for Domino, which SGLang does not know: it looks at `projector_type`.
            config["architectures"] = ["DFlashDraftModel"]
        write_config(draft, config)
        (draft / CARD).write_text(card("zlab", Path(directory).name, read_config(draft), about or About()))
        return require_sound(draft, target)


def servable(drafter: Drafter, layout: Layout = "zlab") -> DFlashDrafter:
    """The drafter, if a server can run it from this layout.

    Raises:
        UserError: naming what can run it instead.
    """
    if type(drafter) is DominoDrafter and layout == "speculators":
        raise UserError("drafter domino: no server reads it in speculators' layout; export --to zlab, for SGLang")
    if type(drafter) not in (DFlashDrafter, DFlash2Drafter, DominoDrafter, DSparkDrafter):
        raise UserError(
            f"drafter {drafter.name}: no server reads this kind, dflash, dflash2, domino or dspark expected; "
            "`specauf evaluate` and specauf.decoding decode with it"
        )
    assert isinstance(drafter, DFlashDrafter)
    if isinstance(drafter, DominoDrafter) and drafter.config.pure_draft_prefix_len != 1:
        raise UserError(
            f"pure_draft_prefix_len: {drafter.config.pure_draft_prefix_len} found, 1 expected by SGLang; "
            "`specauf evaluate` decodes with it, train with 1 for a server"
        )
    if isinstance(drafter, DSparkDrafter) and layout == "speculators" and drafter.markov_head.kind != "vanilla":
        raise UserError(
            f"markov_head_type: {drafter.markov_head.kind} found, vanilla expected by vLLM; export --to zlab, for "
            "SGLang"
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
