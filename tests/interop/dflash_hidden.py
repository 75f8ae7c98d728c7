"""Runs in the environment `dflash`: the hidden states of z-lab's model.

Arguments: drafter directory, file of cases (a list of dicts with `target_hidden`, `noise_embedding`, `position_ids`,
without a batch dimension), file to write the hidden states of the drafted slots to.
"""

import sys

import torch

from tests.interop.dflash_models import load

drafter = load(sys.argv[1])
cases = torch.load(sys.argv[2], weights_only=True)
with torch.inference_mode():
    torch.save([drafter(**{k: v[None] for k, v in case.items()})[0, 1:].clone() for case in cases], sys.argv[3])
