"""Runs in the environment `vllm`: decode prompts with vLLM on a CPU, one prompt after the other, in fp32.

Arguments: target directory, drafter directory in z-lab's or speculators' layout, JSON file with `prompts`,
`max_new_tokens`, `slots` and `method`, file to write. That is a JSON list with `tokens` and `produced` (emitted tokens
of every step, the prompt's pass first) of each prompt. With TRITON_INTERPRET=1 it is vLLM's model runner for GPUs.
"""

import json
import os
import sys
from pathlib import Path

# In one process, which is easier to end; threads that share cores with others must not be bound to them.
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}
if os.environ.get("TRITON_INTERPRET") == "1":
    import vllm_triton  # noqa: F401  (before vLLM)

import torch
from vllm import LLM, SamplingParams
from vllm.model_executor.models.qwen3_dflash import DFlashQwen3Model
from vllm.sampling_params import RequestOutputKind


def normalize_context_k(self: DFlashQwen3Model, keys: torch.Tensor) -> torch.Tensor:
    """RMSNorm of keys [layers, tokens, heads, head_dim] with each layer's own weight.

    vLLM calls its `rms_norm` with the weights of all layers. Its CUDA kernel knows that; its CPU kernel gives every
    layer the first one's, and drafters of several layers lose acceptance.
    """
    scale = torch.rsqrt(keys.pow(2).mean(-1, keepdim=True) + self._rms_norm_eps)
    return keys * scale * self._k_norm_weights[:, None, None]


DFlashQwen3Model._normalize_context_k = normalize_context_k
target, drafter, task, out = sys.argv[1], sys.argv[2], json.loads(Path(sys.argv[3]).read_text()), Path(sys.argv[4])
engine = LLM(
    target,
    dtype="float32",
    max_model_len=max(map(len, task["prompts"])) + task["max_new_tokens"] + task["slots"] + 1,
    enforce_eager=True,
    max_num_seqs=1,
    speculative_config={"method": task["method"], "model": drafter, "num_speculative_tokens": task["slots"]},
).llm_engine
settings = SamplingParams(
    temperature=0, max_tokens=task["max_new_tokens"], output_kind=RequestOutputKind.DELTA, stop_token_ids=task["stops"]
)
answers = []
for number, prompt in enumerate(task["prompts"]):
    engine.add_request(str(number), {"prompt_token_ids": prompt}, settings)
    tokens, produced = [], []
    while engine.has_unfinished_requests():
        for output in engine.step():
            tokens += output.outputs[0].token_ids
            produced.append(len(output.outputs[0].token_ids))
    answers.append({"tokens": tokens, "produced": produced})
out.write_text(json.dumps(answers))
