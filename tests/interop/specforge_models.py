"""Read in the environment `specforge` by its scripts: its models, from a directory, and the target that they borrow."""

import json
from pathlib import Path
from types import SimpleNamespace

import torch
from specforge.modeling.draft.dflash import DFlashDraftModel
from specforge.modeling.draft.domino import DominoDraftModel
from specforge.modeling.draft.dspark import DSparkDraftModel

KINDS = {
    "DFlashDraftModel": DFlashDraftModel,
    "DominoDraftModel": DominoDraftModel,
    "DSparkDraftModel": DSparkDraftModel,
}


def load(directory: str, attention: str = "sdpa"):
    """SpecForge's model of a directory in fp32; nothing may be missing or left over."""
    name = json.loads((Path(directory) / "config.json").read_text())["architectures"][0]
    drafter, info = KINDS[name].from_pretrained(
        directory, dtype=torch.float32, attn_implementation=attention, output_loading_info=True
    )
    assert not any(info.values()), info
    return drafter.eval()


def target(embedding: torch.Tensor, head: torch.Tensor) -> SimpleNamespace:
    """What it takes of a target: the embedding and the head, frozen."""
    embed_tokens = torch.nn.Embedding.from_pretrained(embedding)
    lm_head = torch.nn.Linear(head.shape[1], head.shape[0], bias=False)
    lm_head.weight = torch.nn.Parameter(head, requires_grad=False)
    return SimpleNamespace(model=SimpleNamespace(embed_tokens=embed_tokens), lm_head=lm_head)
