"""Runs in the environment `speculators`: one forward of an export in speculators' layout beside ours.

Arguments: speculators directory, z-lab directory of the same drafter. Prints JSON: the largest difference of the
drafted slots' logits, the largest logit, and how many rows were compared.
"""

import json
import sys
from pathlib import Path

import torch
from speculators.models.dflash import DFlashDraftModel, DFlashSpeculatorConfig

from specauf.checkpoint import load_directory
from specauf.drafters import TargetVocabulary
from tests.drafters.tiny import TinyDocument, batch_of

torch.set_num_threads(1)
theirs_at, ours_at = Path(sys.argv[1]), Path(sys.argv[2])
config = DFlashSpeculatorConfig.from_pretrained(theirs_at)
config.transformer_layer_config._attn_implementation = "eager"  # its default compiles FlexAttention
theirs = DFlashDraftModel.from_pretrained(theirs_at, config=config)
theirs = theirs.float().eval()
ours = load_directory(ours_at)
body = dict(ours.named_parameters())
stored = theirs.state_dict()
assert all(torch.equal(stored[name], value) for name, value in body.items())

shape = ours.config
length, anchors = 40, [3, 11, 12, 20]
random = torch.Generator().manual_seed(0)
tokens = torch.randint(0, shape.vocab_size, (length,), generator=random)
features = torch.randn(length, shape.raw_feature_dim, generator=random)
mask = torch.zeros(1, length)
mask[0, anchors] = 1.0
with torch.no_grad():
    _, logits, _, _, where = theirs._backbone_forward(
        features[None],
        tokens[None],
        mask,
        torch.zeros(1, length, shape.hidden_size),
        torch.zeros(1, length, dtype=torch.long),
        max_anchors=len(anchors),
    )
    assert where.view(len(anchors), -1)[:, 0].tolist() == anchors
    vocabulary = TargetVocabulary(theirs.embed_tokens.weight, theirs.lm_head.weight)
    document = TinyDocument(0, tokens.numpy(), torch.ones(length, dtype=torch.bool).numpy(), features.numpy())
    mine = vocabulary.logits(ours(batch_of([document], [anchors], shape.block_size), vocabulary))
found = logits.view(len(anchors), shape.block_size, -1)[:, 1:]
record = {
    "difference": (found - mine).abs().max().item(),
    "largest": mine.abs().max().item(),
    "rows": mine[..., 0].numel(),
}
json.dump(record, sys.stdout)
