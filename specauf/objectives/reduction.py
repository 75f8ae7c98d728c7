"""One mean over all ranks and micro-batches: divide the global numerator by the global denominator."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _sum_over_ranks(numerator: Tensor, denominator: Tensor) -> tuple[Tensor, Tensor]:
    """Both added up over the ranks; the denominator kept above 0, so that an empty step gives 0."""
    both = torch.stack([numerator.detach(), denominator.detach().to(numerator)])
    if _world_size() > 1:
        dist.all_reduce(both)
    return both[0], both[1].clamp_min(torch.finfo(both.dtype).tiny)


def global_mean(numerator: Float[Tensor, ""], denominator: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """The mean over all ranks: their numerators added up, divided by their denominators added up.

    Every rank gets the same value. The gradient is world_size * d(numerator) / (global denominator), so that DDP and
    FSDP, which average gradients over ranks, arrive at the gradient of the global mean. A collective: every rank must
    call it. 0 when no rank has any weight.
    """
    total, weight = _sum_over_ranks(numerator, denominator)
    own = numerator * (_world_size() / weight)
    return own + (total / weight - own.detach())


class StepMean:
    """The exact mean over all micro-batches and ranks of one optimizer step.

    A mean of micro-batch means depends on how the step is cut, because a loss such as AUF has a different denominator
    in each. So every micro-batch is divided by the first one's denominator, and `finish` corrects the summed gradient
    by (first denominator) / (all denominators). With one micro-batch there is nothing to correct.
    """

    def __init__(self) -> None:
        self._first: Tensor | None = None
        self._total: Tensor | None = None
        self._weight: Tensor | None = None
        self._batches = 0

    def add(self, numerator: Float[Tensor, ""], denominator: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """Take in one micro-batch; returns what to call `backward` on.

        A collective: every rank must call it.
        """
        both = torch.stack([numerator.detach(), denominator.detach().to(numerator)])
        if _world_size() > 1:
            dist.all_reduce(both)
        self._batches += 1
        if self._first is None or self._total is None or self._weight is None:
            self._first = torch.where(both[1] > 0, both[1], torch.ones_like(both[1]))
            self._total, self._weight = both[0], both[1]
        else:
            self._total, self._weight = self._total + both[0], self._weight + both[1]
        return numerator * (_world_size() / self._first)

    @property
    def value(self) -> Float[Tensor, ""]:
        """The mean over all ranks and the micro-batches so far; 0 when none has any weight."""
        assert self._total is not None, "no micro-batch was added"
        assert self._weight is not None
        return self._total / self._weight.clamp_min(torch.finfo(self._weight.dtype).tiny)

    def finish(self, parameters: Iterable[nn.Parameter], divided_by: int = 1) -> Float[Tensor, ""]:
        """Turn the summed gradients (averaged over ranks, as DDP does) into the mean's, and start anew.

        Args:
            parameters: whose gradients to correct.
            divided_by: what each micro-batch's loss was divided by before its backward pass; Lightning divides by
                `accumulate_grad_batches`.

        Returns:
            The mean.
        """
        value, first, weight, batches = self.value, self._first, self._weight, self._batches
        assert first is not None
        assert weight is not None
        self._first = self._total = self._weight = None
        self._batches = 0
        if batches == divided_by == 1:
            return value
        factor = torch.where(weight > 0, divided_by * first / weight.clamp_min(torch.finfo(weight.dtype).tiny), 1.0)
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad *= factor.to(parameter.grad)
        return value
