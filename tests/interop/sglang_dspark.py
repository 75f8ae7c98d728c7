"""Runs in the environment `sglang`: what SGLang reads of a DSpark export, and the tokens that it drafts.

Arguments: drafter directory; file with hidden states `hidden` [blocks, rows, hidden], anchors' `tokens` and
`head`; file to write, with the drafted `tokens` and the logits of the `confidence` in them. SGLang's engine refuses
DSpark on a CPU; its reading of config.json, its heads and its drafting of a block are plain PyTorch.
"""

import os
import sys
from collections import defaultdict

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig

for each in ("nms", "qnms"):  # see sglang_decode.py
    torch.library.define(f"torchvision::{each}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


# With its other mode it has no confidence head.
os.environ["SGLANG_RAGGED_VERIFY_MODE"] = "compact"


class OneRank:
    """Stands for a group of GPUs with one member, which has nothing to tell the others."""

    @staticmethod
    def sync(site, values):
        return values


def require_command(drafter: str, slots: int) -> None:
    """Let SGLang look at the options that a model card names, as it does when it is started on a GPU."""
    from sglang.srt.arg_groups import speculative_hook
    from sglang.srt.speculative.dspark_components import dspark_config

    # All else is None, as `defaultdict` has it.
    said = {
        "device": "cuda", "attn_dp_size": 1, "pp_size": 1, "json_model_override_args": "{}",
        "speculative_draft_model_path": drafter, "speculative_dspark_block_size": slots,
    }  # fmt: skip
    options = defaultdict(lambda: None, said)
    view = type("View", (), {"__getattr__": lambda self, name: options[name]})()
    speculative_hook.resolving_view = dspark_config.resolved_view = lambda _: view
    speculative_hook.declare_resolution = lambda _, __, **found: options.update(found)
    speculative_hook._handle_dspark(view)
    assert options["speculative_num_draft_tokens"] == slots + 1


def main(drafter: str, given: str, out: str) -> None:
    from sglang.srt.models.dspark import build_confidence_head, build_markov_head
    from sglang.srt.speculative.dspark_components import dspark_config, dspark_draft

    config = AutoConfig.from_pretrained(drafter)
    read = dspark_config.parse_dspark_draft_config(draft_hf_config=config)
    assert read.require_markov()
    case, stored = torch.load(given, weights_only=True), load_file(f"{drafter}/model.safetensors")
    # As named by its DSparkDraftModel, whose other tensors are DFlash's.
    parts = nn.ModuleDict({"markov_head": build_markov_head(config), "confidence_head": build_confidence_head(config)})
    parts.load_state_dict({name: value for name, value in stored.items() if name.split(".")[0] in parts})
    hidden = case["hidden"]
    flat, blocks, slots = hidden.flatten(0, 1), *hidden.shape[:2]
    if not dspark_config.get_dspark_sample_from_anchor(config):
        slots -= 1
        flat, hidden = dspark_draft.select_draft_hidden_without_anchor(flat, bs=blocks, gamma=slots)
    require_command(drafter, slots)
    with torch.no_grad():
        tokens, _ = dspark_draft.draft_markov_block(
            markov_head=parts["markov_head"],
            base_logits=(flat @ case["head"].T).view(blocks, slots, -1),
            anchor_tokens=case["tokens"],
            draft_hidden=hidden,
            step_temperatures=torch.zeros(blocks),
            noise=dspark_draft.DraftNoise(0, torch.zeros(1, dtype=torch.int64)),
            tp_sync=OneRank(),
            greedy_draft=True,
        )
        _, confidence = parts["confidence_head"].predict(
            hidden, anchor_tokens=case["tokens"], draft_tokens=tokens, markov_head=parts["markov_head"]
        )
    torch.save({"tokens": tokens, "confidence": confidence}, out)


if __name__ == "__main__":
    main(*sys.argv[1:4])
