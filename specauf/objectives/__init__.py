"""Objectives: a weighting of the block's slots times a divergence. See `docs/objectives.md` for all of them."""

from specauf.objectives.auf import AcceptUntilFail, ExclusiveCut, SoftTail, accept_until_fail, exclusive_cut, soft_tail
from specauf.objectives.block_loss import block_loss
from specauf.objectives.distillation import (
    ExpectedAcceptedLength,
    ForwardKL,
    JensenShannon,
    LKHybrid,
    NegativeLogAcceptance,
    ReverseKL,
    TotalVariation,
)
from specauf.objectives.divergence import CrossEntropy, Divergence, Mixture
from specauf.objectives.dpace import DPace, dpace
from specauf.objectives.objective import LossOutput, Objective
from specauf.objectives.reduction import StepMean, global_mean
from specauf.objectives.weighting import (
    ExponentialDecay,
    Survival,
    Uniform,
    WarmUp,
    Weighting,
    exponential_decay,
    survival,
    uniform,
)

__all__ = [
    "AcceptUntilFail",
    "CrossEntropy",
    "DPace",
    "Divergence",
    "ExclusiveCut",
    "ExpectedAcceptedLength",
    "ExponentialDecay",
    "ForwardKL",
    "JensenShannon",
    "LKHybrid",
    "LossOutput",
    "Mixture",
    "NegativeLogAcceptance",
    "Objective",
    "ReverseKL",
    "SoftTail",
    "StepMean",
    "Survival",
    "TotalVariation",
    "Uniform",
    "WarmUp",
    "Weighting",
    "accept_until_fail",
    "block_loss",
    "dpace",
    "exclusive_cut",
    "exponential_decay",
    "global_mean",
    "soft_tail",
    "survival",
    "uniform",
]
