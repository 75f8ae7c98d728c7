"""A checkpoint that is validated on another cache of its target: what must be the same, and how it reads a sketch."""

from typing import Any

import torch
from torch import Tensor

from specauf.cache import Cache
from specauf.drafters import Drafter
from specauf.drafters.sketch import fold, unfold
from specauf.errors import UserError
from specauf.fingerprint import comparable


def check_same_drafter(about: dict[str, Any], cache: Cache, drafter: Drafter) -> None:
    """Refuse to validate on another target's cache, or as another drafter; the corpus and the sketch may differ.

    Args:
        about: what the checkpoint says under the key `specauf`.
        cache: to validate on.
        drafter: as it was built for that cache.

    Raises:
        UserError: naming what differs, with both values.
    """
    # Checkpoints of early versions do not name their target.
    saved, given = about.get("target"), cache.manifest.identity.target
    if about["cache_fingerprint"] != cache.fingerprint and (saved is None or not _same_weights(saved, given)):
        raise UserError(
            f"data.cache: {cache.url} is of the target {_named(given)}, --ckpt_path is of a drafter for "
            f"{_named(saved) if saved else 'a target it does not name'}: give the cache it was trained on"
            f"{', or another of that target' if saved else ''}"
        )
    found = {"drafter": about["drafter"], **about["config"]}
    for name, value in {"drafter": drafter.name, **drafter.config.to_dict()}.items():
        # `for_sketch` sees to the width of the features; tuples of a checkpoint come back as they went in.
        if name != "feature_dim" and found.get(name) != value:
            raise UserError(
                f"--ckpt_path: its drafter has {name} {found.get(name)}, model.drafter and data.cache give {value}: "
                "validate with the run's own config.yaml, on a cache with the same taps and mask token"
            )


def _same_weights(one: dict[str, str], two: dict[str, str]) -> bool:
    """By all that tells a target's weights; the id is a name, which may be the user's own."""
    first, second = ({k: v for k, v in t.items() if k != "id"} or t for t in comparable(one, two))
    return first == second


def _named(target: dict[str, str]) -> str:
    return " ".join([target.get("id", "?"), *(value[:12] for key, value in target.items() if key != "id")])


def for_sketch(fc: Tensor, old: dict[str, Tensor] | None, new: dict[str, Tensor] | None) -> Tensor:
    """`fc` over what one cache holds of the features, made to read what another holds; None stands for all of them.

    Over another sketch it reads the features as far as that sketch keeps them.
    """
    same = old is new or (old and new and all(torch.equal(old[key], new[key]) for key in ("basis", "scale")))
    if same:
        return fc
    raw = fold(fc, old) if old else fc
    return unfold(raw, new) if new else raw
