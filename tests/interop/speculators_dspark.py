"""Runs in the environment `speculators`: a DSpark export in speculators' layout beside ours, forward and one step.

Arguments: its directory. Prints JSON: names that were `missing` or `unexpected` when it was loaded; how many `rows`
were compared; of a step on DSpark's loss, the confidence's included, `loss` by theirs and by ours and the largest
difference of a `gradient` as a part of its largest number.

Its loss is divided by the number of slots, ours by their weights, which without decay are the same.
"""

import json
import sys

import torch
from speculators.losses import resolve_loss_config
from speculators.models.dspark import DSparkDraftModel, DSparkSpeculatorConfig

from specauf.data.batch import BlockTargets
from specauf.objectives import CrossEntropy, Mixture, Objective, TotalVariation, Uniform
from specauf.objectives.support import branch_losses
from tests.interop.speculators_models import ANCHORS, farthest, load


def main(directory: str) -> None:
    torch.set_num_threads(1)
    theirs, ours, record, given, batch, target, vocabulary = load(directory, DSparkSpeculatorConfig, DSparkDraftModel)
    ours.confidence_weight = 0.5
    slots = torch.tensor(ANCHORS)[:, None] + torch.arange(ours.config.slots)
    chances, ids = target[slots].sort(-1, descending=True)
    plain = batch.targets
    batch = batch.with_targets(BlockTargets(plain.labels, plain.valid, ids, chances, torch.ones_like(chances[..., 0])))
    _, loss, _ = theirs(
        *given,
        loss_config=resolve_loss_config('{"ce": 0.1, "tv": 1.8}', "eager"),
        tv_loss_fn=resolve_loss_config("tv", "eager")["tv"][0],
        gamma=1e12,
        max_anchors=len(ANCHORS),
        confidence_head_alpha=0.5,
    )
    loss.backward()
    objective = Objective(Uniform(), Mixture([CrossEntropy(), TotalVariation()], [0.1, 1.8]))
    ((_, out),) = branch_losses(ours.train().branches(batch, vocabulary), batch.targets, objective)
    mine = out.numerator / out.denominator
    mine.backward()
    record |= {"rows": int(out.seen.sum()), "loss": [loss.item(), mine.item()]}
    record |= {"gradient": farthest(theirs, ours), "confidence": mine.item() - float(out.losses.mean())}
    json.dump(record, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
