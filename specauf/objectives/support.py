"""The same objective over other slots than it would choose itself: for drafters with more than one branch."""

import copy
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from specauf.data.batch import BlockTargets
from specauf.drafters.base import Branch
from specauf.errors import UserError
from specauf.objectives.auf import AcceptUntilFail, ExclusiveCut, SoftTail
from specauf.objectives.block_loss import block_loss
from specauf.objectives.confidence import with_confidence
from specauf.objectives.objective import LossOutput, Objective
from specauf.objectives.weighting import ExponentialDecay, Uniform, WarmUp, Weighting


def branch_losses(
    branches: Iterable[Branch],
    targets: BlockTargets,
    objective: Objective,
    *,
    step: int = 0,
    chunk_blocks: int = 32,
    every_slot: bool = False,
) -> Iterator[tuple[Branch, LossOutput]]:
    """The objective on each branch of a drafter, over the slots that the branch asks for; those that share come last.

    Args:
        branches: of one drafter.
        targets: what to compare with.
        objective: on every branch; where one wants the whole block, without its cut at the first failure.
        step: optimizer step.
        chunk_blocks: see `block_loss`.
        every_slot: see `block_loss`.
    """
    counted: dict[str, Tensor] = {}
    for branch in sorted(branches, key=lambda branch: branch.support not in ("own", "whole")):
        chosen = objective if branch.support == "own" else whole_block(objective)
        some = targets
        if branch.support not in ("own", "whole"):
            if _soft(objective.weighting):
                raise UserError(
                    f"drafter.auf_on: {branch.name} counts what {branch.support} does, but the loss's SoftTail leaves "
                    "no slot out that could be shared; give another auf_on"
                )
            some = only_on(targets, counted[branch.support])
        settings: dict[str, Any] = {"step": step, "chunk_blocks": chunk_blocks, "every_slot": every_slot}
        out = block_loss(branch.rows, branch.head, some, chosen, **settings)
        counted[branch.name] = out.weights
        if branch.confidence is not None:
            out = with_confidence(out, branch.confidence, chosen)
        if some is not targets:
            out = replace(out, valid=chosen.prefix(targets), complete=False)
            if every_slot:
                with torch.no_grad():  # the slots that do not count, for metrics alone
                    look = block_loss(branch.rows, branch.head, targets, chosen, **settings)
                out = replace(look, numerator=out.numerator, denominator=out.denominator, weights=out.weights)
        yield branch, out


def whole_block(objective: Objective) -> Objective:
    """The objective without its cut at the first failure; a decay over the slots stays."""
    other = copy.copy(objective)
    other.weighting = _uncut(objective.weighting)
    return other


def only_on(targets: BlockTargets, weights: Tensor) -> BlockTargets:
    """The targets of the slots that another branch counted, weights [blocks, slots] above 0.

    Its support must be a prefix of each block, as that of every loss that cuts at a failure is.
    """
    return BlockTargets(
        targets.labels,
        targets.valid & (weights > 0),
        targets.teacher_ids,
        targets.teacher_logprobs,
        targets.head_mass,
    )


def _soft(weighting: Weighting) -> bool:
    if isinstance(weighting, WarmUp):
        return _soft(weighting.before) or _soft(weighting.after)
    return isinstance(weighting, SoftTail)


def _uncut(weighting: Weighting) -> Weighting:
    if isinstance(weighting, AcceptUntilFail) and weighting.decay_gamma is not None:
        return ExponentialDecay(weighting.decay_gamma)
    if isinstance(weighting, AcceptUntilFail | ExclusiveCut | SoftTail):
        return Uniform()
    if isinstance(weighting, WarmUp):
        return WarmUp(_uncut(weighting.before), _uncut(weighting.after), weighting.warmup_steps, weighting.schedule)
    return weighting
