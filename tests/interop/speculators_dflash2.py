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
from pathlib import Path
from typing import Any

import torch
from speculators.losses import resolve_loss_config
from speculators.models.dflash import core
from speculators.models.dflash2 import DFlash2DraftModel, DFlash2SpeculatorConfig

from specauf.checkpoint import load_directory
from specauf.drafters import TargetVocabulary
from specauf.objectives import CrossEntropy, Objective, Uniform
from specauf.objectives.support import branch_losses
from tests.drafters.tiny import TinyDocument, batch_of

LENGTH, ANCHORS = 40, [3, 11, 12, 20]


def load(directory: str) -> tuple[Any, dict]:
    config = DFlash2SpeculatorConfig.from_pretrained(directory)
    config.transformer_layer_config._attn_implementation = "eager"  # its default compiles FlexAttention
    model, about = DFlash2DraftModel.from_pretrained(directory, config=config, output_loading_info=True)
    # Its copy of the verifier's head and norm, which it reads from the verifier.
    model.verifier_lm_head.weight.data.copy_(model.lm_head.weight)
    torch.nn.init.ones_(model.verifier_norm.weight)
    known = ("verifier_lm_head.weight", "verifier_norm.weight")
    names = {"missing": [n for n in about["missing_keys"] if n not in known], "unexpected": about["unexpected_keys"]}
    return model.float(), {name: sorted(found) for name, found in names.items()}


def main(directory: str) -> None:
    torch.set_num_threads(1)
    theirs, record = load(directory)
    ours = load_directory(Path(directory))
    body = dict(ours.named_parameters())
    assert all(torch.equal(theirs.state_dict()[name], value) for name, value in body.items())
    random = torch.Generator().manual_seed(0)
    features = torch.randn(LENGTH, ours.config.raw_feature_dim, generator=random)
    last = torch.randn(1, LENGTH, ours.config.hidden_size, generator=random)
    with torch.no_grad():
        chosen = theirs.verifier_lm_head(theirs.verifier_norm(last))[0].argmax(-1)
    tokens = chosen.roll(1)
    core.select_anchors = lambda *_: (torch.tensor(ANCHORS), torch.ones(len(ANCHORS), dtype=torch.bool))
    given = (features[None], tokens[None], torch.ones(1, LENGTH), last, torch.zeros(1, LENGTH, dtype=torch.long))
    document = TinyDocument(0, tokens.numpy(), torch.ones(LENGTH, dtype=torch.bool).numpy(), features.numpy())
    batch = batch_of([document], [ANCHORS], ours.config.block_size)
    vocabulary = TargetVocabulary(theirs.embed_tokens.weight.detach(), theirs.lm_head.weight.detach())
    drafted = slice(1, None)  # slot 0 is the anchor's
    with torch.no_grad():
        hidden, logits, _, _, where = theirs._backbone_forward(*given, max_anchors=len(ANCHORS))
        before = theirs._predecessor_ids(tokens[None], where).reshape(1, -1)
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
    wanted = dict(theirs.named_parameters())
    far = {n: (wanted[n].grad - p.grad.to_dense()).abs().max() / p.grad.to_dense().abs().max() for n, p in body.items()}
    record |= {"loss": [loss.item(), mine.item()], "gradient": max(far.values()).item()}
    json.dump(record, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
