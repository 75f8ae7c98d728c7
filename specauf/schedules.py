"""Learning-rate schedules over the whole run, as factors of the optimizer's rate."""

import math
from abc import ABC, abstractmethod
from typing import ClassVar

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from specauf.errors import UserError


class Schedule(ABC):
    """Turns an optimizer and the run's length into a per-step scheduler.

    Attributes:
        needs_length: it is spread over the run, and so makes nothing for one without end.
    """

    needs_length: ClassVar[bool] = True

    @abstractmethod
    def build(self, optimizer: Optimizer, total_steps: int | float) -> LambdaLR:
        """The scheduler of a run of `total_steps` optimizer steps, infinity for one without end."""

    def require_length(self, total_steps: int | float) -> None:
        """Refuse a run without end if this schedule is spread over the run.

        Raises:
            UserError: it is.
        """
        if self.needs_length and math.isinf(total_steps):
            raise UserError(
                f"trainer.max_steps is -1 and so is trainer.max_epochs, but model.schedule {type(self).__name__} is "
                "spread over the run's length: give --trainer.max_steps=N, or --model.schedule=Constant"
            )


class WarmupCosine(Schedule):
    """Linear warm-up, then half a cosine down to `floor`.

    Args:
        warmup: share of the run spent warming up.
        floor: factor at the end.
    """

    def __init__(self, warmup: float = 0.04, floor: float = 0.0) -> None:
        _check_shares(warmup=warmup, floor=floor)
        self.warmup, self.floor = warmup, floor

    def build(self, optimizer: Optimizer, total_steps: int | float) -> LambdaLR:
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
        _check_shares(warmup=warmup, decay=decay, floor=floor)
        self.warmup, self.decay, self.floor = warmup, decay, floor

    def build(self, optimizer: Optimizer, total_steps: int | float) -> LambdaLR:
        """The scheduler of a run of `total_steps` optimizer steps."""
        rise, fall = max(1, round(self.warmup * total_steps)), max(1, round(self.decay * total_steps))

        def factor(step: int) -> float:
            left = (total_steps - step) / fall
            return min(1.0, (step + 1) / rise, self.floor + (1 - self.floor) * max(0.0, min(1.0, left)))

        return LambdaLR(optimizer, factor)


class Constant(Schedule):
    """Linear warm-up, then the optimizer's rate to the end; the run's length need not be known.

    Args:
        warmup_steps: optimizer steps spent warming up.
    """

    needs_length = False

    def __init__(self, warmup_steps: int = 0) -> None:
        if warmup_steps < 0:
            raise UserError(f"schedule warmup_steps is {warmup_steps}: give at least 0")
        self.warmup_steps = warmup_steps

    def build(self, optimizer: Optimizer, total_steps: int | float) -> LambdaLR:
        """The scheduler of a run of any length."""
        return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(1, self.warmup_steps)))


def _check_shares(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise UserError(f"schedule {name} is {value}: give 0 to 1")
