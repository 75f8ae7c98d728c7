"""Runs in the environment `speculators`: a DFlash 2 export in speculators' layout beside ours, forward and one step.

Arguments: its directory. Prints JSON: names that were `missing` or `unexpected` when it was loaded; of the forward pass
how many `rows` were compared, the largest logit and the largest differences of the `base` logits and of the candidates'
`final` ones; of a step on both cross-entropies, over all candidates, `loss` by theirs and by ours and the largest
difference of a `gradient` as a part of its largest number.

speculators takes the verifier's most probable token for the label and makes it a candidate when it is none. So tokens
here are the verifier's choices, and where every token is a candidate its loss on them is ours.
"""

import json
import sys

import torch
from speculators.losses import resolve_loss_config
from speculators.models.dflash2 import DFlash2DraftModel, DFlash2SpeculatorConfig

from specauf.objectives import CrossEntropy, Objective, Uniform
from specauf.objectives.support import branch_losses
from tests.interop.speculators_models import ANCHORS, farthest, load


def main(directory: str) -> None:
    torch.set_num_threads(1)
    theirs, ours, record, given, batch, _, vocabulary = load(directory, DFlash2SpeculatorConfig, DFlash2DraftModel)
    drafted = slice(1, None)  # slot 0 is the anchor's
    with torch.no_grad():
        hidden, logits, _, _, where = theirs._backbone_forward(*given, max_anchors=len(ANCHORS))
        before = theirs._predecessor_ids(given[1], where).reshape(1, -1)
        ids, scores = theirs.candidate_selector.select(logits, hidden, before)
        base, final = (branch.head(branch.rows) for branch in ours.branches(batch, vocabulary))
        shape = (len(ANCHORS), ours.config.block_size, -1)
        logits, ids, scores = (each.view(shape)[:, drafted] for each in (logits, ids, scores))
    record |= {
        "rows": base[..., 0].numel(),
        "largest": base.abs().max().item(),
        "base": (logits - base).abs().max().item(),
        "final": (scores - final.gather(-1, ids)).abs().max().item(),
        "moved": (final - base).abs().max().item(),
    }
    losses = {
        "loss_config": resolve_loss_config("ce", "eager"),
        "tv_loss_fn": resolve_loss_config("tv", "eager")["tv"][0],
    }
    _, loss, _ = theirs(*given, gamma=1e12, max_anchors=len(ANCHORS), selector_loss_alpha=1.0, **losses)
    loss.backward()
    objective, mine = Objective(Uniform(), CrossEntropy()), torch.zeros(())
    for branch, out in branch_losses(ours.train().branches(batch, vocabulary), batch.targets, objective):
        mine = mine + branch.weight * out.numerator / out.denominator
    mine.backward()
    record |= {"loss": [loss.item(), mine.item()], "gradient": farthest(theirs, ours)}
    json.dump(record, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
