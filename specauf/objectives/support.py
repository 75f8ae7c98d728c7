"""The same objective over other slots than it would choose itself: for drafters with more than one branch."""

import copy

from torch import Tensor

from specauf.data.batch import BlockTargets
from specauf.objectives.auf import AcceptUntilFail, ExclusiveCut, SoftTail
from specauf.objectives.objective import Objective
from specauf.objectives.weighting import ExponentialDecay, Uniform, WarmUp, Weighting


def whole_block(objective: Objective) -> Objective:
    """The objective without its cut at the first failure; a decay over the slots stays."""
    other = copy.copy(objective)
    other.weighting = _uncut(objective.weighting)
    return other


def only_on(targets: BlockTargets, weights: Tensor) -> BlockTargets:
    """The targets of the slots that another branch counted, weights [blocks, slots] above 0.

    Its support must be a prefix of each block, as that of every loss that cuts at a failure is.
    """
    return BlockTargets(
        targets.labels,
        targets.valid & (weights > 0),
        targets.teacher_ids,
        targets.teacher_logprobs,
        targets.head_mass,
    )


def _uncut(weighting: Weighting) -> Weighting:
    if isinstance(weighting, AcceptUntilFail) and weighting.decay_gamma is not None:
        return ExponentialDecay(weighting.decay_gamma)
    if isinstance(weighting, AcceptUntilFail | ExclusiveCut | SoftTail):
        return Uniform()
    if isinstance(weighting, WarmUp):
        return WarmUp(_uncut(weighting.before), _uncut(weighting.after), weighting.warmup_steps, weighting.schedule)
    return weighting
