"""Runs in the environment `llama_cpp`: compare an export with what llama.cpp's converter made of it.

Arguments: z-lab directory, GGUF file. Prints JSON: metadata and, for every tensor, its shape and
whether its numbers are those of the export.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader
from safetensors.torch import load_file

drafter, converted = map(Path, sys.argv[1:3])
names = {
    "fc.weight": "fc.weight",
    "hidden_norm.weight": "enc.output_norm.weight",
    "norm.weight": "output_norm.weight",
    "markov_head.markov_w1.weight": "markov_w1.weight",
    "markov_head.markov_w2.weight": "markov_w2.weight",
    "confidence_head.proj.weight": "conf_proj.weight",
    "confidence_head.proj.bias": "conf_proj.bias",
    "candidate_selector.predecessor_codebook": "selector_predecessor.weight",
    "candidate_selector.successor_codebook": "selector_successor.weight",
    "candidate_selector.hidden_projection.weight": "selector_hidden.weight",
}
parts = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "attention_conv.kernel_projection": "attn_conv_proj",
    "mlp_conv.kernel_projection": "ffn_conv_proj",
}
# Names that are no matrices' there.
bare = {"attention_conv.base_kernel": "attn_conv_base", "mlp_conv.base_kernel": "ffn_conv_base"}
reader = GGUFReader(converted)
found = {
    tensor.name: np.array(tensor.data).reshape(tuple(reversed(tensor.shape.tolist()))) for tensor in reader.tensors
}
equal = {}
for name, value in load_file(drafter / "model.safetensors").items():
    theirs = names.get(name)
    if theirs is None:
        _, layer, part = name.removesuffix(".weight").split(".", 2)
        theirs = f"blk.{layer}.{bare[part]}" if part in bare else f"blk.{layer}.{parts[part]}.weight"
    equal[name] = theirs in found and torch.equal(torch.from_numpy(found.pop(theirs).copy()), value.float())
fields = {}
for name, part in reader.fields.items():
    if name.startswith(("dflash.", "general.architecture")) or name.endswith("mask_token_id"):
        fields[name] = part.contents()
json.dump({"fields": fields, "equal": equal, "left": sorted(found)}, sys.stdout)
