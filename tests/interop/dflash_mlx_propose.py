"""Runs in the environment `dflash_mlx`: what the MLX half of z-lab's package drafts from given hidden states.

Arguments: as those of `dflash_propose.py`.
"""

import sys

import mlx.core as mx
import torch

from tests.interop.dflash_mlx_models import load_draft

drafter, given = load_draft(sys.argv[1]), torch.load(sys.argv[2], weights_only=True)
head = mx.array(given["head"].numpy())
drafter.lm_head = lambda hidden: hidden @ head.T
mx.random.seed(0)
found = []
for rows, anchor in zip(given["rows"], given["anchors"], strict=True):
    hidden = mx.array(rows[None].numpy())
    drafted = drafter.candidate_selector.select(
        hidden, drafter.compute_logits(hidden), mx.array([anchor.item()]), float(sys.argv[3])
    )
    names = zip(("tokens", "candidates", "probs"), drafted, strict=True)
    found.append({name: torch.tensor(value[0].tolist()) for name, value in names if value is not None})
torch.save(found, sys.argv[4])
