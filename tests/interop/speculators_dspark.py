"""Runs in the environment `speculators`: a DSpark export in speculators' layout beside ours, forward and one step.

Arguments: its directory. Prints JSON: names that were `missing` or `unexpected` when it was loaded; how many `rows`
were compared; of a step on DSpark's loss, the confidence's included, `loss` by theirs and by ours and the largest
difference of a `gradient` as a part of its largest number.

speculators takes the verifier's most probable token for the label, so tokens here are the verifier's choices. Its loss
is divided by the number of slots, ours by their weights, which without decay are the same.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from speculators.losses import resolve_loss_config
from speculators.models.dflash import core
from speculators.models.dspark import DSparkDraftModel, DSparkSpeculatorConfig

from specauf.checkpoint import load_directory
from specauf.data.batch import BlockTargets
from specauf.drafters import TargetVocabulary
from specauf.objectives import CrossEntropy, Mixture, Objective, TotalVariation, Uniform
from specauf.objectives.support import branch_losses
from tests.drafters.tiny import TinyDocument, batch_of

LENGTH, ANCHORS = 40, [3, 11, 12, 20]


def load(directory: str) -> tuple[Any, dict]:
    config = DSparkSpeculatorConfig.from_pretrained(directory)
    config.transformer_layer_config._attn_implementation = "eager"  # its default compiles FlexAttention
    model, about = DSparkDraftModel.from_pretrained(directory, config=config, output_loading_info=True)
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
    ours.confidence_weight = 0.5
    body = dict(ours.named_parameters())
    assert all(torch.equal(theirs.state_dict()[name], value) for name, value in body.items())
    random = torch.Generator().manual_seed(0)
    features = torch.randn(LENGTH, ours.config.raw_feature_dim, generator=random)
    last = torch.randn(1, LENGTH, ours.config.hidden_size, generator=random)
    with torch.no_grad():
        target = theirs.verifier_lm_head(theirs.verifier_norm(last))[0].log_softmax(-1)
    tokens = target.argmax(-1).roll(1)
    core.select_anchors = lambda *_: (torch.tensor(ANCHORS), torch.ones(len(ANCHORS), dtype=torch.bool))
    given = (features[None], tokens[None], torch.ones(1, LENGTH), last, torch.zeros(1, LENGTH, dtype=torch.long))
    document = TinyDocument(0, tokens.numpy(), torch.ones(LENGTH, dtype=torch.bool).numpy(), features.numpy())
    batch = batch_of([document], [ANCHORS], ours.config.block_size)
    slots = torch.tensor(ANCHORS)[:, None] + torch.arange(ours.config.slots)
    chances, ids = target[slots].sort(-1, descending=True)
    plain = batch.targets
    batch = batch.with_targets(BlockTargets(plain.labels, plain.valid, ids, chances, torch.ones_like(chances[..., 0])))
    vocabulary = TargetVocabulary(theirs.embed_tokens.weight.detach(), theirs.lm_head.weight.detach())
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
    wanted = dict(theirs.named_parameters())
    far = {n: (wanted[n].grad - p.grad).abs().max() / p.grad.abs().max() for n, p in body.items()}
    record |= {"rows": int(out.seen.sum()), "loss": [loss.item(), mine.item()]}
    record |= {"gradient": max(far.values()).item(), "confidence": mine.item() - float(out.losses.mean())}
    json.dump(record, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
