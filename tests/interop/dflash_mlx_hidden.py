"""Runs in the environment `dflash_mlx`: the hidden states of the MLX half of z-lab's package.

Arguments: as those of `dflash_hidden.py`; positions are counted from 0.
"""

import sys

import mlx.core as mx
import torch

from tests.interop.dflash_mlx_models import load_draft

drafter = load_draft(sys.argv[1])
drafter.embed_tokens = lambda slots: slots
found = []
for case in torch.load(sys.argv[2], weights_only=True):
    assert case["position_ids"][0] == 0
    slots, features = (mx.array(case[name][None].numpy()) for name in ("noise_embedding", "target_hidden"))
    rows = drafter.hidden_states(slots, features, drafter.make_cache(), logits_start=1)
    found.append(torch.tensor(rows[0].tolist()))
torch.save(found, sys.argv[3])
