"""Runs in the environment `specforge`: its rules for accepted lengths and for anchors, on random cases.

Arguments: file of a dict with `predicted`, `labels`, `valid` [cases blocks slots] and `loss_masks` (a list, each
[tokens]), file to write `accepted` [cases blocks] and `anchors`, the eligible positions of each mask, to.
"""

import sys

import torch
from specforge.algorithms.common.dflash_family_model import OnlineDFlashModel, compute_accept_len

given = torch.load(sys.argv[1], weights_only=True)
accepted = compute_accept_len(given["predicted"], given["labels"], given["valid"])
nothing = torch.nn.Identity()
model = OnlineDFlashModel(nothing, nothing, nothing, mask_token_id=0, num_anchors=10**6)
anchors = []
for mask in given["loss_masks"]:
    found, keep = model._sample_anchor_positions(len(mask), mask[None], mask.device)
    anchors.append(found[keep].tolist())
torch.save({"accepted": accepted, "anchors": anchors}, sys.argv[2])
