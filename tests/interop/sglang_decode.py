"""Runs in the environment `sglang`: decode prompts with SGLang on a CPU, one prompt after the other, in fp32.

Arguments: target directory, drafter directory in z-lab's layout, JSON file with `prompts`, `max_new_tokens`, `stops`
and `slots`, file to write. That is a JSON list with `tokens` and `produced` (emitted tokens of every cycle) of each
prompt. The target's embedding must be of bfloat16 numbers, or SGLang drafts from other ones than ours.
"""

import json
import os
import sys
from pathlib import Path

import torch

# In every process of SGLang's, which start this script again. It imports torchvision, whose compiled part wants a GPU's
# torch and is then left out by torchvision itself; what goes on to name these two needs them declared, never run.
for each in ("nms", "qnms"):
    torch.library.define(f"torchvision::{each}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def install_plugins(folder: Path) -> None:
    """Make sglang_cpu.py known to SGLang, as an installed package would be."""
    about = folder / "specauf_cpu-0.dist-info"
    about.mkdir(parents=True, exist_ok=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: specauf-cpu\nVersion: 0\n")
    groups = {"platforms": "platform", "plugins": "plugin"}
    lines = [f"[sglang.srt.{group}]\nspecauf = sglang_cpu:{function}\n" for group, function in groups.items()]
    (about / "entry_points.txt").write_text("".join(lines))
    sys.path.append(str(folder))
    os.environ["SGLANG_PLATFORM"] = "specauf"


def main(target: str, drafter: str, task: dict, out: Path) -> None:
    cycles = out.with_suffix(".cycles")
    install_plugins(out.with_suffix(".plugins"))
    os.environ |= {"SGLANG_NATIVE_MOVE_KV_CACHE": "1", "SPECAUF_CYCLES": str(cycles)}
    from sglang.srt.entrypoints.engine import Engine

    engine = Engine(
        model_path=target,
        dtype="float32",
        device="cpu",
        attention_backend="torch_native",
        sampling_backend="pytorch",
        speculative_algorithm="DFLASH",
        speculative_draft_model_path=drafter,
        speculative_num_draft_tokens=task["slots"] + 1,
        context_length=1024,
        max_total_tokens=4096,
        max_running_requests=1,
        disable_cuda_graph=True,
        disable_overlap_schedule=True,
        disable_radix_cache=True,
        skip_tokenizer_init=True,
        skip_server_warmup=True,
    )
    settings = {"temperature": 0, "max_new_tokens": task["max_new_tokens"], "stop_token_ids": task["stops"]}
    answers = []
    for prompt in task["prompts"]:
        cycles.write_text("")
        answer = engine.generate(input_ids=prompt, sampling_params=settings)
        lines = [json.loads(line) for line in cycles.read_text().splitlines()]
        answers.append({"tokens": answer["output_ids"], "produced": [produced for (produced,) in lines]})
    out.write_text(json.dumps(answers))
    engine.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(Path(sys.argv[3]).read_text()), Path(sys.argv[4]))
