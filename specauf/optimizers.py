"""Muon for matrices and AdamW for the rest, as one optimizer."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from specauf.errors import UserError

# Longer ones are a vocabulary's rows (Domino's second projection), which Muon is not for.
_LONGEST = 16


class MuonAdamW(Optimizer):
    """Orthogonalised momentum (Muon, Jordan et al. 2024) for hidden matrices, AdamW for norms and everything else.

    One learning rate serves both: Muon's step is scaled to the size of AdamW's (Liu et al., arXiv 2502.16982).

    Args:
        params: those of the drafter.
        lr: learning rate.
        weight_decay: decoupled, on the matrices.
        momentum: of Muon.
        betas: of AdamW.

    Raises:
        UserError: this torch has no Muon.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 3.0e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
    ) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise UserError(
                f"optimizer MuonAdamW: torch {torch.__version__} has no Muon, 2.9 or later does; upgrade it, or take "
                "--model.optimizer=torch.optim.AdamW"
            )
        given = list(params)
        matrices = [p for p in given if p.ndim == 2 and max(p.shape) <= _LONGEST * min(p.shape)]
        taken = {id(p) for p in matrices}
        rest = [p for p in given if id(p) not in taken]
        self._parts: list[Optimizer] = []
        if matrices:
            settings: dict[str, Any] = {"momentum": momentum, "adjust_lr_fn": "match_rms_adamw"}
            self._parts.append(torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, **settings))
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
