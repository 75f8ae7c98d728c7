"""Muon for matrices and AdamW for the rest, as one optimizer."""

from collections.abc import Callable, Iterable
from math import sqrt
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from specauf.linear import bfloat16_is_fast

# Longer ones are a vocabulary's rows (Domino's second projection), which Muon is not for.
_LONGEST = 16
# Of Jordan's quintic iteration, which takes singular values from 0 to 1 to about 0.7 to 1.2 in so many steps.
_COEFFICIENTS, _ITERATIONS = (3.4445, -4.7750, 2.0315), 5
# From this many times as long as wide, products of the small Gram matrix are the fewer operations.
_OBLONG = 1.5


def orthogonalised(matrix: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
    """A matrix with the same singular vectors, its singular values near 1: Newton-Schulz (Jordan et al. 2024).

    In bfloat16, as published; in float32 on CPUs without instructions for the former, where it takes 80 times as long.
    """
    x = matrix.to(torch.bfloat16 if bfloat16_is_fast(matrix.device) else torch.float32)
    x = x.T if matrix.shape[0] > matrix.shape[1] else x
    x = x / x.norm().clamp(min=1e-7)
    x = _by_gram(x) if x.dtype == torch.float32 and x.shape[1] >= _OBLONG * x.shape[0] else _by_definition(x)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def _by_definition(x: Tensor) -> Tensor:
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _by_gram(x: Tensor) -> Tensor:
    """The same but for rounding: each iteration multiplies x by a polynomial of its Gram matrix, so these suffice."""
    a, b, c = _COEFFICIENTS
    gram, product = x @ x.T, None
    for left in reversed(range(_ITERATIONS)):
        factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal().add_(a)
        product = factor if product is None else factor @ product
        if left:
            gram = factor @ gram @ factor
    assert product is not None
    return product @ x


class Muon(Optimizer):
    """Orthogonalised Nesterov momentum, its step scaled to the size of AdamW's (Liu et al., arXiv 2502.16982).

    Where `orthogonalised` works in bfloat16, `torch.optim.Muon(adjust_lr_fn="match_rms_adamw")` bit for bit.

    Args:
        params: matrices.
        lr: learning rate.
        weight_decay: decoupled.
        momentum: share of the running mean that stays at each step.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, weight_decay: float, momentum: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr, momentum = float(group["lr"]), group["momentum"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter.grad)
                mean = state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
                update = orthogonalised(parameter.grad.lerp(mean, momentum))
                parameter.mul_(1 - lr * group["weight_decay"])
                parameter.add_(update, alpha=-lr * 0.2 * sqrt(max(parameter.shape)))
        return loss


class MuonAdamW(Optimizer):
    """Orthogonalised momentum (Muon) for hidden matrices, AdamW for norms and everything else.

    One learning rate serves both.

    Args:
        params: those of the drafter.
        lr: learning rate.
        weight_decay: decoupled, on the matrices.
        momentum: of Muon.
        betas: of AdamW.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 3.0e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
    ) -> None:
        given = list(params)
        matrices = [p for p in given if p.ndim == 2 and max(p.shape) <= _LONGEST * min(p.shape)]
        taken = {id(p) for p in matrices}
        rest = [p for p in given if id(p) not in taken]
        self._parts: list[Optimizer] = []
        if matrices:
            self._parts.append(Muon(matrices, lr=lr, weight_decay=weight_decay, momentum=momentum))
        if rest:
            self._parts.append(AdamW(rest, lr=lr, weight_decay=0.0, betas=betas))
        super().__init__([group for part in self._parts for group in part.param_groups], {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both."""
        loss: Tensor | float | None = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part, group in zip(self._parts, self.param_groups, strict=True):
            # Groups and state are this optimizer's, which schedules change and checkpoints replace.
            part.param_groups, part.state = [group], self.state
            part.step()
        return loss
