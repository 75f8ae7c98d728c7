"""The loss of a drafter's confidence: how likely it says each slot is accepted, against what came (DSpark, 2607.05147).

    l[b,k] = -(a log c + (1 - a) log(1 - c))        a = alpha[b,k], or whether the drafted token was right

a is alpha where the batch carries the target's top-k, which it does for losses that read it: then c is the chance under
sampled verification, by the lower bound that K tokens give. Else a is 1 or 0, and c the chance that the most probable
token is accepted. The slots count as they do for the tokens: under AUF through the first failure, so that c[k] is
learnt where all slots before k were accepted, as servers read it. A loss that leaves failures out (`auf-exclusive`)
teaches 1.
"""

from dataclasses import replace

import torch

from specauf.drafters.base import Confidence
from specauf.objectives.objective import LossOutput, Objective


def with_confidence(out: LossOutput, confidence: Confidence, objective: Objective) -> LossOutput:
    """The loss of the tokens with that of the confidence added, over the same slots with the same weights.

    Args:
        out: of the tokens.
        confidence: in these; its gradient goes into the drafter as that of the tokens does.
        objective: which `out` is of.
    """
    logits = confidence.logits.to(out.weights.dtype)
    came = (out.correct if out.alpha is None else out.alpha).to(logits.dtype)
    losses = torch.nn.functional.binary_cross_entropy_with_logits(logits, came, reduction="none")
    weights = objective.block_scale(out.weights) * out.weights
    added = torch.where(weights > 0, weights * losses, torch.zeros_like(losses)).sum()
    error = (logits.detach().sigmoid() - came).abs()
    return replace(out, numerator=out.numerator + confidence.weight * added, confidence_error=error)
