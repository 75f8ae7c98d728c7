"""D-PACE: weights from the drafter's own confidence, arXiv 2605.18810.

    s_j = (1 - alpha) q_j(y_j) + alpha            smoothed probability of the label, detached
    C_j = prod_{i<=j} s_i                         cumulative confidence: how likely slot j is accepted
    w_j = sum_{m>=j} C_m                          what slot j is worth: all lengths that run through it

The sum runs to the end of the block's valid prefix. w = C * V splits into the paper's two ablations, cumulative
confidence C and continuation value V_j = sum_{m>=j} prod_{j<i<=m} s_i. AUF is C with a hard s and an exclusive product.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from specauf.errors import UserError
from specauf.objectives.evidence import Evidence, valid_prefix
from specauf.objectives.weighting import Weighting

Part = Literal["full", "cumulative", "continuation"]


def dpace(
    token_prob: Float[Tensor, "blocks slots"],
    valid: Bool[Tensor, "blocks slots"],
    alpha: float | int = 0.5,
    part: Part = "full",
) -> Float[Tensor, "blocks slots"]:
    """D-PACE weights, detached.

    Args:
        token_prob: q of the label at each slot, in 0..1.
        valid: the slot may be supervised; the first invalid slot ends the block.
        alpha: smoothing; the paper finds 0.3 to 0.7 alike.
        part: full w, or one of its factors C (cumulative) and V (continuation).
    """
    prefix = valid_prefix(valid)
    smooth = (1 - alpha) * token_prob.detach() + alpha
    # Past the prefix nothing can be accepted.
    smooth = torch.where(prefix, smooth, torch.zeros_like(smooth))
    cumulative = smooth.cumprod(dim=-1)
    if part == "cumulative":
        return cumulative
    # V_j = 1 + s_{j+1} V_{j+1}, from the block's end: no division by a product that may vanish.
    value = torch.ones_like(smooth[:, 0])
    values = [value]
    for k in range(smooth.shape[1] - 1, 0, -1):
        value = 1 + smooth[:, k] * value
        values.append(value)
    continuation = torch.stack(values[::-1], dim=-1) * prefix
    return continuation if part == "continuation" else cumulative * continuation


class DPace(Weighting):
    """D-PACE: a slot counts by its chance to be reached times the length still to be won there.

    Args:
        smoothing: alpha in s = (1 - alpha) q + alpha.
        part: full, or one of the paper's two ablations: cumulative (confidence), continuation (value).
    """

    def __init__(self, smoothing: float = 0.5, part: Part = "full"):
        if not 0 <= smoothing <= 1:
            raise UserError(f"loss smoothing is {smoothing}: give 0 to 1, such as 0.5")
        self.smoothing = smoothing
        self.part: Part = part

    def __call__(self, evidence: Evidence, step: int) -> Float[Tensor, "blocks slots"]:
        """See `dpace`."""
        return dpace(evidence.label_prob, evidence.valid, self.smoothing, self.part)
