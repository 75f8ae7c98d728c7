"""Learning-rate schedules over the whole run, as factors of the optimizer's rate."""

import math
from abc import ABC, abstractmethod

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class Schedule(ABC):
    """Turns an optimizer and the run's length into a per-step scheduler."""

    @abstractmethod
    def build(self, optimizer: Optimizer, total_steps: int) -> LambdaLR:
        """The scheduler of a run of `total_steps` optimizer steps."""


class WarmupCosine(Schedule):
    """Linear warm-up, then half a cosine down to `floor`.

    Args:
        warmup: share of the run spent warming up.
        floor: factor at the end.
    """

    def __init__(self, warmup: float = 0.04, floor: float = 0.0) -> None:
        self.warmup, self.floor = warmup, floor

    def build(self, optimizer: Optimizer, total_steps: int) -> LambdaLR:
        """The scheduler of a run of `total_steps` optimizer steps."""
        rise = max(1, round(self.warmup * total_steps))

        def factor(step: int) -> float:
            if step < rise:
                return (step + 1) / rise
            share = min(1.0, (step - rise) / max(1, total_steps - rise))
            return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * share))

        return LambdaLR(optimizer, factor)


class WarmupStableDecay(Schedule):
    """Linear warm-up, a plateau, then a linear fall to `floor`.

    Args:
        warmup: share of the run spent warming up.
        decay: share of the run spent falling.
        floor: factor at the end.
    """

    def __init__(self, warmup: float = 0.04, decay: float = 0.2, floor: float = 0.0) -> None:
        self.warmup, self.decay, self.floor = warmup, decay, floor

    def build(self, optimizer: Optimizer, total_steps: int) -> LambdaLR:
        """The scheduler of a run of `total_steps` optimizer steps."""
        rise, fall = max(1, round(self.warmup * total_steps)), max(1, round(self.decay * total_steps))

        def factor(step: int) -> float:
            left = (total_steps - step) / fall
            return min(1.0, (step + 1) / rise, self.floor + (1 - self.floor) * max(0.0, min(1.0, left)))

        return LambdaLR(optimizer, factor)
