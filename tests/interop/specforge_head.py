"""Runs in the environment `specforge`: Domino's head on hidden states that are given to it.

Arguments: file of cases (a list of dicts with `directory`, `embedding`, `head`, `hidden` [blocks block hidden] and
`tokens` [blocks block]), file to write `final` logits and drafted `tokens` of each case to. Each drafter is also
written anew, by SpecForge's own `save_pretrained`, into `again` in its directory.
"""

import sys
from pathlib import Path

import torch

from tests.interop.specforge_models import load, target

answers = []
for case in torch.load(sys.argv[1], weights_only=True):
    drafter = load(case["directory"])
    drafter.save_pretrained(Path(case["directory"]) / "again")
    owner, hidden, tokens = target(case["embedding"], case["head"]), case["hidden"], case["tokens"]
    undrafted = torch.full_like(tokens, drafter.mask_token_id)
    undrafted[:, 0] = tokens[:, 0]
    with torch.inference_mode():
        final = drafter.apply_logits_head(
            owner.lm_head(hidden)[None],
            prev_token_embeddings=owner.model.embed_tokens(tokens)[None],
            hidden_states=hidden[None],
        )
        drafted = drafter._sample_draft_tokens(owner, hidden, undrafted)
    answers.append({"final": final[0].clone(), "tokens": drafted.clone()})
torch.save(answers, sys.argv[2])
