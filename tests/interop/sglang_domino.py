"""Runs in the environment `sglang`: what SGLang reads of a Domino export, and the tokens that its rollout drafts.

Arguments: drafter directory; file with hidden states `hidden` [blocks, slots and anchor, hidden], anchors' `tokens`,
`embedding` and `head`; file to write, with the drafted tokens. SGLang's engine runs Domino on CUDA alone; its reading
of config.json and its rollout are plain PyTorch.
"""

import sys

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig

for each in ("nms", "qnms"):  # see sglang_decode.py
    torch.library.define(f"torchvision::{each}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def main(drafter: str, given: str, out: str) -> None:
    from sglang.srt.speculative.dflash_utils import parse_dflash_draft_config
    from sglang.srt.speculative.domino_utils import domino_greedy_rollout

    config = AutoConfig.from_pretrained(drafter)
    read = parse_dflash_draft_config(draft_hf_config=config)
    assert read.is_domino
    hidden, state, rank = config.hidden_size, read.gru_hidden_dim, read.emb_dim
    up, down = nn.Linear(hidden + state, rank, bias=False), nn.Linear(rank, config.vocab_size, bias=False)
    # As its DFlashDraftModel makes them, and names their tensors.
    gru, project = nn.GRU(hidden, state, batch_first=True, bias=False), nn.Sequential(up, nn.SiLU(), down)
    parts, stored = nn.ModuleDict({"prefix_gru": gru, "embed_proj": project}), load_file(f"{drafter}/model.safetensors")
    parts.load_state_dict({name: stored[name] for name in parts.state_dict()})
    case = torch.load(given, weights_only=True)
    with torch.no_grad():
        drafted = domino_greedy_rollout(
            draft_hidden=case["hidden"],
            bonus_tokens=case["tokens"],
            target_embedding=nn.Embedding.from_pretrained(case["embedding"]),
            lm_head_weight=case["head"],
            prefix_gru=gru,
            embed_proj=project,
            vocab_size=config.vocab_size,
            shift_label=read.shift_label,
            candidate_pool_size=0,
            in_cuda_graph=False,
        )
    torch.save(drafted, out)


if __name__ == "__main__":
    main(*sys.argv[1:4])
