"""Starting from a drafter that exists: its weights, its shape, and the cache's way of giving features."""

from dataclasses import replace
from pathlib import Path

from specauf.cache.target import TargetFiles
from specauf.drafters.base import Drafter
from specauf.drafters.config import DrafterConfig
from specauf.drafters.dflash import DFlashDrafter
from specauf.drafters.dflash2 import DFlash2Drafter
from specauf.drafters.domino import DominoDrafter
from specauf.drafters.dspark import DSparkDrafter
from specauf.drafters.sketch import sketch_of
from specauf.errors import UserError

_SAME = (
    "hidden_size",
    "vocab_size",
    "num_target_layers",
    "taps",
    "feature_dim",
    "mask_token_id",
    "block_size",
    "sample_from_anchor",
    "enable_confidence_head",
)


def continue_from(init: Path, fresh: Drafter, target: TargetFiles) -> Drafter:
    """The drafter at `init`, ready to go on training on a cache.

    A DFlash drafter may also become the backbone of a Domino, DSpark or DFlash 2 drafter. On a cache of sketches `fc`
    is narrowed to read them.

    Args:
        init: a run, a checkpoint, a z-lab or a speculators directory.
        fresh: what would be trained without it: its kind, and the shape that must agree.
        target: the cache's.

    Raises:
        UserError: it is of another kind, or another target's.
    """
    from specauf.checkpoint import load_drafter  # it reads all kinds of drafters, and so imports this package

    found = load_drafter(init, fresh.config.num_target_layers)
    grows = type(found) is DFlashDrafter and isinstance(fresh, DFlash2Drafter | DominoDrafter | DSparkDrafter)
    if type(found) is not type(fresh) and not grows:
        raise UserError(f"init: {init} holds a {found.name} drafter, {fresh.name} expected; train DRAFTER={found.name}")
    sketch = sketch_of(target) if fresh.needs_features else None
    wanted = replace(fresh.config, feature_dim=fresh.config.raw_feature_dim) if sketch else fresh.config
    check_same_target(init, found.config, wanted)
    # Not every layout says how the target embeds; the cache does.
    found.config = replace(found.config, embedding_scale=wanted.embedding_scale, logit_softcap=wanted.logit_softcap)
    if grows:
        found = grown(found, fresh)
    if isinstance(found, DominoDrafter) and isinstance(fresh, DominoDrafter):
        found.auf_on, found.base_start, found.base_ratio = fresh.auf_on, fresh.base_start, fresh.base_ratio
    if isinstance(found, DFlash2Drafter) and isinstance(fresh, DFlash2Drafter):
        found.auf_on, found.base_weight = fresh.auf_on, fresh.base_weight
    if isinstance(found, DSparkDrafter) and isinstance(fresh, DSparkDrafter):
        found.confidence_weight = fresh.confidence_weight
    if sketch and isinstance(found, DFlashDrafter):
        return found.unfold_sketch(sketch)
    return found


def grown(backbone: Drafter, fresh: Drafter) -> Drafter:
    """A drafter of the kind of `fresh` with the weights of a DFlash drafter, its shape, and new ones for the rest."""
    shape = backbone.config.to_dict()
    config = type(fresh.config)(**(fresh.config.to_dict() | shape | {"taps": backbone.config.taps}))
    drafter = type(fresh)(config)
    drafter.load_state_dict(drafter.state_dict() | backbone.state_dict())
    return drafter


def check_same_target(init: Path, found: DrafterConfig, expected: DrafterConfig) -> None:
    """Refuse a checkpoint that was made for something else than this cache.

    Raises:
        UserError: naming the first field that differs, with both values.
    """
    for name in _SAME:
        mine, wanted = getattr(found, name, None), getattr(expected, name, None)
        if mine != wanted and None not in (mine, wanted):
            raise UserError(
                f"{name}: {mine} in {init}, {wanted} in the cache and config; "
                "use the cache of that drafter's target, or change the config"
            )
