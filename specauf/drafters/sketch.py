"""The cache's sketch of the features, y = P^T S^-1 x, as the drafter's `fc` needs it: folded in, and taken out."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from specauf.cache.target import TargetFiles


def sketch_of(target: TargetFiles) -> dict[str, Tensor] | None:
    """What folds a sketch into `fc`: `basis` P [features, rank] and `scale` S [features]; None without a sketch."""
    basis, scale = target.sketch_basis, target.sketch_scale
    if basis is None or scale is None:
        return None
    return {"basis": torch.from_numpy(basis.copy()), "scale": torch.from_numpy(scale.copy())}


def fold(fc: Float[Tensor, "hidden rank"], sketch: Mapping[str, Tensor]) -> Float[Tensor, "hidden features"]:
    """`fc` over raw features that gives exactly what `fc` over their sketch gives: fc_r P^T S^-1."""
    raw = fc.detach().double() @ sketch["basis"].double().T / sketch["scale"].double()
    return raw.to(fc.dtype)


def unfold(fc: Float[Tensor, "hidden features"], sketch: Mapping[str, Tensor]) -> Float[Tensor, "hidden rank"]:
    """`fc` over the sketch for one over raw features: fc S P, exact for features that the sketch keeps, x = S P y."""
    narrow = (fc.detach().double() * sketch["scale"].double()) @ sketch["basis"].double()
    return narrow.to(fc.dtype)
