"""Runs in the environment `specforge`: the hidden states of its DFlash.

Arguments: as of `dflash_hidden.py`, and the attention to run.
"""

import sys

import torch

from tests.interop.specforge_models import load

drafter = load(sys.argv[1], sys.argv[4])
cases = torch.load(sys.argv[2], weights_only=True)
with torch.inference_mode():
    torch.save([drafter(**{k: v[None] for k, v in case.items()})[0, 1:].clone() for case in cases], sys.argv[3])
