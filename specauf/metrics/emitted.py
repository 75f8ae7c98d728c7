"""How many tokens a cycle of speculative decoding commits, overall and slot by slot."""

from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchmetrics import Metric

UNITS = 2**32
"""A real number is added up in so many parts of 1, as an integer: exact in any order, and MPS has no float64."""


def share_of(part: Int[Tensor, ""], whole: Int[Tensor, ""], units: int = 1) -> Float[Tensor, ""]:
    """Quotient of two sums, `part` counted in parts of 1 / units, rounded to float32 once; 0 when nothing was added."""
    return torch.tensor(int(part) / units / max(1, int(whole)), dtype=torch.float32, device=part.device)


def accepted_lengths(
    correct: Bool[Tensor, "blocks slots"], valid: Bool[Tensor, "blocks slots"]
) -> tuple[Int[Tensor, " counted"], Int[Tensor, " counted"]]:
    """A of each block, the number of correct slots before the first wrong or invalid one, and the slots it could reach.

    Blocks without any valid slot are left out. Taking the product per block and then the mean is what decoding does;
    the product of the slots' mean accuracies is biased low, because easy blocks stay easy.

    Args:
        correct: the draft token equals the accepted one.
        valid: the slot can be verified; the first invalid slot ends the block.
    """
    prefix = valid.cumprod(dim=-1).bool()
    counted = prefix.any(-1)
    accepted = (prefix & correct).cumprod(dim=-1).sum(-1)
    return accepted[counted], prefix.sum(-1)[counted]


class AcceptedLength(Metric):
    """Mean A: draft tokens accepted in a cycle, the target's own token not counted.

    Args:
        average: pooled: over all cycles (vLLM, DeepSpec). prompt: mean over prompts of each prompt's mean (z-lab); each
            update then holds the cycles of one prompt.
        kwargs: of `torchmetrics.Metric`.
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, average: Literal["pooled", "prompt"] = "pooled", **kwargs: Any):
        super().__init__(**kwargs)
        self.average = average
        for name in ("total", "count"):
            self.add_state(name, torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, accepted: Int[Tensor, " cycles"]) -> None:
        """Add cycles.

        Args:
            accepted: A of each cycle, from decoding, from replay, or from `accepted_lengths`.
        """
        if not len(accepted):
            return
        if self.average == "prompt":
            self.total += round(int(accepted.sum()) * UNITS / len(accepted))
            self.count += 1
        else:
            self.total += accepted.sum()
            self.count += len(accepted)

    def compute(self) -> Float[Tensor, ""]:
        """Mean A; 0 before the first cycle."""
        return share_of(self.total, self.count, UNITS if self.average == "prompt" else 1)


class EmittedLength(AcceptedLength):
    """Mean tau = A + 1: tokens committed in a cycle. This is what papers and z-lab call acceptance length.

    Args:
        average: pooled or prompt, see `AcceptedLength`.
        kwargs: of `torchmetrics.Metric`.
    """

    def compute(self) -> Float[Tensor, ""]:
        """Mean tau; 1, plain decoding, before the first cycle."""
        return super().compute() + 1


class SlotAcceptance(Metric):
    """Acceptance of each slot k = 1..B-1, in both meanings that are in use.

        survival[k]    = #{A >= k} / #{cycles that could reach slot k}               DeepSpec's accept_rate
        conditional[k] = #{A >= k} / #{A >= k-1, of cycles that could reach slot k}  Spec-AUF's and DSpark's alpha_k

    Args:
        slots: drafted slots of a block, block_size - 1.
        kwargs: of `torchmetrics.Metric`.
    """

    full_state_update = False
    accepted: Tensor
    possible: Tensor
    reached: Tensor

    def __init__(self, slots: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.slots = slots
        for name in ("accepted", "possible", "reached"):
            self.add_state(name, torch.zeros(slots, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, accepted: Int[Tensor, " cycles"], possible: Int[Tensor, " cycles"] | None = None) -> None:
        """Add cycles.

        Args:
            accepted: A of each cycle.
            possible: slots the cycle could have accepted at most: fewer than a block's at the end of an answer; all
                when None.
        """
        k = torch.arange(1, self.slots + 1, device=accepted.device)
        limit = torch.full_like(accepted, self.slots) if possible is None else possible
        could = limit[:, None] >= k
        self.accepted += (could & (accepted[:, None] >= k)).sum(0)
        self.possible += could.sum(0)
        self.reached += (could & (accepted[:, None] >= k - 1)).sum(0)

    def compute(self) -> dict[str, Float[Tensor, " slots"]]:
        """Survival and conditional acceptance per slot, and `reached`, the cycles behind each conditional rate.

        A slot that no cycle reached has rate 0.
        """
        return {
            "survival": self.accepted / self.possible.clamp_min(1),
            "conditional": self.accepted / self.reached.clamp_min(1),
            "reached": self.reached.to(torch.get_default_dtype()),
        }
