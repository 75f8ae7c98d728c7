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
    in each. So: call `backward` on what `add` returns (plain sums), and `finish` before clipping and stepping.
    """

    def __init__(self) -> None:
        self._sums: tuple[Tensor, Tensor] | None = None

    def add(self, numerator: Float[Tensor, ""], denominator: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """Take in one micro-batch; returns what to call `backward` on."""
        new = numerator.detach(), denominator.detach().to(numerator)
        self._sums = new if self._sums is None else (self._sums[0] + new[0], self._sums[1] + new[1])
        return numerator

    def finish(self, parameters: Iterable[nn.Parameter]) -> Float[Tensor, ""]:
        """Turn the summed gradients (averaged over ranks, as DDP does) into the mean's; returns the mean.

        A collective: every rank must call it.
        """
        assert self._sums is not None, "finish() before any add()"
        total, weight = _sum_over_ranks(*self._sums)
        self._sums = None
        factor = _world_size() / weight
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad *= factor.to(parameter.grad.dtype)
        return total / weight
