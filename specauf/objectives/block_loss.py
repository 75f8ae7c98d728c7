"""LM head and loss together, some blocks at a time: the [blocks slots vocabulary] logits never exist at once.

Each group of rows runs the head, is read, weighed and scored, and its gradient with respect to the rows is taken at
once; only that gradient, as large as the rows, is kept. The result has the value and the gradient of
`Objective.loss(head(rows), ...)`.

A weighting that stops at the first failure (AUF) goes further: slot 1 of every block, then slot 2 of the blocks still
alive, and so on. A drafter with emitted length tau then pays for about tau rows a block instead of B-1.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from specauf.data.batch import BlockTargets
from specauf.objectives.dense import logit_gradient, read_rows
from specauf.objectives.evidence import DraftReading, Evidence, zero_where_not
from specauf.objectives.objective import LossOutput, Objective

Head = Callable[[Tensor], Tensor]

# A matrix product with this many rows costs little more than with one: the head's weights must be read anyway.
# When fewer blocks are alive, several slots of each are tried at once. A GPU has about 300 operations a byte read.
ROWS_AT_LEAST, ROWS_AT_LEAST_ON_GPU = 16, 256

# Their output belongs to nobody else and their backward does not look at it, so that we may write over it.
_OWN_OUTPUT = ("MmBackward0", "AddmmBackward0", "_OneDnnBackward")


def block_loss(
    rows: Float[Tensor, "blocks slots width"],
    head: nn.Module | Head,
    targets: BlockTargets,
    objective: Objective,
    *,
    step: int = 0,
    chunk_blocks: int = 32,
    every_slot: bool = False,
) -> LossOutput:
    """Numerator and denominator of an objective, from the drafter's last hidden states.

    Args:
        rows: what the head reads, of the drafted slots k = 1..B-1.
        head: maps each row on its own, [m width] -> logits [m vocabulary]. A module's (or its method's) trainable
            parameters receive their gradient, or the tensors that its `trained()` names instead; a plain callable must
            not use trainable tensors of its own.
        targets: what to compare with.
        objective: weighting, divergence and reduction.
        step: optimizer step, for weightings that change over training.
        chunk_blocks: blocks per group; memory grows with this and not with the number of blocks.
        every_slot: compute every valid slot's logits even where the loss would not look, for metrics.

    Raises:
        UserError: the objective needs the target's log-probs and the batch has none.
        ValueError: a plain callable used tensors that require a gradient.
    """
    objective.check(targets)
    parameters = _trainable(head)
    with_grad = torch.is_grad_enabled() and (rows.requires_grad or bool(parameters))
    if with_grad and not parameters:
        _check_frozen(head, rows)
    run = _Run(rows.detach(), head, parameters, targets, objective, step, with_grad)
    blocks, slots = targets.valid.shape
    stops = objective.weighting.stops_at_failure(step) and objective.divergence.slot_by_slot and not every_slot
    if stops and not (parameters and objective.reduction == "block"):
        run.until_failure(max_rows=chunk_blocks * slots)
    else:
        for start in range(0, blocks, chunk_blocks):
            run.visit(torch.arange(start, min(start + chunk_blocks, blocks), device=rows.device), 0, slots, whole=True)
    return run.output(rows)


def _trainable(head: nn.Module | Head) -> list[Tensor]:
    owner = getattr(head, "__self__", head)
    if not isinstance(owner, nn.Module):
        return []
    return [tensor for tensor in getattr(owner, "trained", owner.parameters)() if tensor.requires_grad]


def _check_frozen(head: nn.Module | Head, rows: Tensor) -> None:
    with torch.enable_grad():
        probe = head(rows.detach().flatten(0, 1)[:0])
    if probe.requires_grad:
        raise ValueError(
            "the head is a plain callable that uses tensors requiring a gradient, which they would not receive: "
            "pass an nn.Module that owns them as parameters"
        )


class _Run:
    """The state of one call: what is known of each slot so far, and the gradients gathered so far."""

    def __init__(
        self,
        rows: Tensor,
        head: nn.Module | Head,
        parameters: list[Tensor],
        targets: BlockTargets,
        objective: Objective,
        step: int,
        with_grad: bool,
    ):
        self.rows, self.head, self.parameters = rows, head, parameters
        self.objective, self.step, self.with_grad = objective, step, with_grad
        self.prefix = objective.prefix(targets)
        self.labels = objective.tokens(targets, objective.labels)
        self.accepted = objective.accepted(targets)
        self.dtype = dtype = torch.promote_types(rows.dtype, torch.float32)
        self.teacher = objective.teacher(targets, self.prefix, dtype)
        grid = torch.zeros(self.prefix.shape, dtype=dtype, device=rows.device)
        self.weights, self.losses, self.label_prob = grid, grid.clone(), grid.clone()
        self.alpha = None if self.teacher is None else grid.clone()
        self.seen = torch.zeros_like(self.prefix)
        self.correct = torch.zeros_like(self.prefix)
        self.rows_grad = torch.zeros_like(rows) if with_grad else None
        self.parameter_grads = [torch.zeros_like(p) for p in parameters] if with_grad else []
        self.until_first_failure = False

    def until_failure(self, max_rows: int) -> None:
        """Visit slots in order, dropping a block after its first failure."""
        # A block's normaliser is known only when it has ended, so it is applied to the gradient at the end.
        self.until_first_failure = True
        slots = self.prefix.shape[1]
        fill = ROWS_AT_LEAST if self.rows.device.type == "cpu" else ROWS_AT_LEAST_ON_GPU
        alive = self.prefix[:, 0].nonzero()[:, 0]
        at, tried = 0, 1
        while at < slots and len(alive):
            width = min(slots - at, max(tried, fill // len(alive)))
            for some in alive.split(max(1, max_rows // width)):
                self.visit(some, at, at + width, whole=False, none_missing=width == 1)
            passed = self.correct[alive, at : at + width].all(-1)
            at += width
            if at < slots:
                left = alive[passed & self.prefix[alive, at]]
                # While no block fails, twice as many slots each time: else the head would be read once a slot.
                tried = 2 * width if len(left) == len(alive) else 1
                alive = left

    def visit(self, blocks: Tensor, start: int, stop: int, *, whole: bool, none_missing: bool = False) -> None:
        """Head, loss and gradient of slots start..stop-1 of some blocks.

        Args:
            blocks: their numbers.
            start: first slot.
            stop: behind the last one.
            whole: these are all slots of the blocks.
            none_missing: all of them are valid.
        """
        window = slice(start, stop)
        mask = self.prefix[blocks, window]
        # Numbers, found once: every index by a mask would wait for the GPU to count.
        row, column = _all_places(mask) if none_missing else mask.nonzero(as_tuple=True)
        if not len(row):
            return
        places = (blocks[row], column + start)
        picked = self.rows[places].requires_grad_(self.with_grad)
        with torch.set_grad_enabled(self.with_grad):
            logits = self.head(picked)
        labels = self.labels[places]
        teacher = None if self.teacher is None else self.teacher[blocks, window]
        sparse = () if self.teacher is None else (self.teacher.ids[places], self.teacher.known[places])
        overwrite = type(logits.grad_fn).__name__ in _OWN_OUTPUT
        dense = read_rows(logits.detach(), labels, *sparse, overwrite=overwrite)
        correct = torch.zeros_like(mask)
        correct[row, column] = dense.greedy == self.accepted[places]
        self.seen[blocks, window] = mask
        self.correct[blocks, window] = correct

        leaves = [v.to(self.dtype) for v in (dense.label, dense.head, dense.tail) if v is not None]
        leaves = [v.requires_grad_(self.with_grad) for v in leaves]
        with torch.set_grad_enabled(self.with_grad):
            draft = DraftReading(*(_grid(v, mask, row, column) for v in leaves))
            weights = self._weigh(blocks, window, self.objective.evidence(draft, teacher, correct, mask))
            losses = zero_where_not(mask, self.objective.divergence(draft, teacher))
            scale = self.objective.block_scale(weights) if whole else torch.ones_like(weights[:, :1])
            numerator = (scale * weights * losses).sum()
        self.losses[blocks, window] = losses.detach()
        if self.with_grad:
            grads = torch.autograd.grad(numerator, leaves, allow_unused=True, materialize_grads=True)
            label_grad, *sparse_grads = (g.to(dense.softmax.dtype) for g in grads)
            gradient = logit_gradient(dense, labels, label_grad, *sparse, *sparse_grads)
            self._backward(logits, picked, gradient.to(logits.dtype), places)

    def _weigh(self, blocks: Tensor, window: slice, evidence: Evidence) -> Tensor:
        self.label_prob[blocks, window] = evidence.label_prob * evidence.valid
        if self.alpha is not None and evidence.alpha is not None:
            self.alpha[blocks, window] = evidence.alpha * evidence.valid
        known = Evidence(
            self.prefix[blocks],
            self.correct[blocks],
            self.label_prob[blocks],
            None if self.alpha is None else self.alpha[blocks],
        )
        weights = self.objective.weigh(known, self.step)[:, window]
        self.weights[blocks, window] = weights
        return weights

    def _backward(self, logits: Tensor, picked: Tensor, gradient: Tensor, places: tuple[Tensor, Tensor]) -> None:
        assert self.rows_grad is not None
        row_grad, *parameter_grads = torch.autograd.grad(
            logits, [picked, *self.parameters], gradient, allow_unused=True, materialize_grads=True
        )
        self.rows_grad[places] = row_grad
        for total, new in zip(self.parameter_grads, parameter_grads, strict=True):
            total += new

    def output(self, rows: Tensor) -> LossOutput:
        """The result, with the gathered gradients attached to the numerator."""
        scale = self.objective.block_scale(self.weights)
        numerator = (scale * self.weights * self.losses).sum()
        if self.rows_grad is not None:
            if self.until_first_failure:
                self.rows_grad *= scale[..., None]
            numerator = _WithGradient.apply(numerator, self.rows_grad, self.parameter_grads, rows, *self.parameters)
        return LossOutput(
            numerator=numerator,
            denominator=self.objective.denominator(self.weights, self.prefix),
            weights=self.weights,
            losses=self.losses,
            valid=self.prefix,
            seen=self.seen,
            correct=self.correct,
            alpha=self.alpha,
            complete=not self.until_first_failure,
        )


def _all_places(mask: Tensor) -> tuple[Tensor, Tensor]:
    """`mask.nonzero(as_tuple=True)` of a column that is True everywhere."""
    row = torch.arange(len(mask), device=mask.device)
    return row, torch.zeros_like(row)


def _grid(values: Tensor, mask: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Values put back in their places of a [blocks slots ...] grid, 0 elsewhere."""
    grid = torch.zeros((*mask.shape, *values.shape[1:]), dtype=values.dtype, device=values.device)
    return grid.index_put((row, column), values)


class _WithGradient(torch.autograd.Function):
    """Give a number the gradients that were computed along with it."""

    @staticmethod
    def forward(ctx, value, rows_grad, parameter_grads, rows, *parameters):  # type: ignore[no-untyped-def]
        ctx.rows_grad, ctx.parameter_grads = rows_grad, parameter_grads
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return None, None, None, _times(ctx.rows_grad, grad), *(_times(g, grad) for g in ctx.parameter_grads)


def _times(gathered: Tensor, grad: Tensor) -> Tensor:
    """Their product, in the type of the first; a loss scaled for fp16 has a gradient that fp16 cannot hold."""
    wide = torch.promote_types(gathered.dtype, torch.float32)
    return (gathered.to(wide) * grad.to(wide)).to(gathered.dtype)
