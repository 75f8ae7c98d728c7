"""Runs in the environment `dflash`: what z-lab's DFlash 2 drafts from given hidden states.

Arguments: drafter directory, file with `head` (the target's) and `rows` and `anchors` (hidden states of drafted slots,
and the token before them, of every block), temperature, file to write a dict of every block to: `tokens`, `candidates`
of each slot and, above temperature 0, the candidates' probabilities `probs`.
"""

import sys

import torch

from tests.interop.dflash_models import load

drafter, given = load(sys.argv[1]), torch.load(sys.argv[2], weights_only=True)
head = torch.nn.Linear(*reversed(given["head"].shape), bias=False)
head.weight = torch.nn.Parameter(given["head"], requires_grad=False)
torch.manual_seed(0)
found = []
with torch.inference_mode():
    for rows, anchor in zip(given["rows"], given["anchors"], strict=True):
        drafted = drafter.propose(rows[None], anchor[None], head, float(sys.argv[3]))
        names = zip(("tokens", "candidates", "probs"), drafted, strict=True)
        found.append({name: value[0].clone() for name, value in names if value is not None})
torch.save(found, sys.argv[4])
