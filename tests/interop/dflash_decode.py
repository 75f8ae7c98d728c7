"""Runs in the environment `dflash`: decode prompts with z-lab's package.

Arguments: drafter directory, target (directory or name in configs/target), JSON file with `prompts`, `max_new_tokens`
and `stops`. Prints a JSON list with `tokens` and `produced` (emitted tokens of every cycle) of each prompt.
"""

import json
import sys
import time
from pathlib import Path

import dflash.model
import torch
from dflash.model import dflash_generate

from specauf.targets import load_target, resolve_target
from tests.interop.dflash_models import load

# Its statistics wait for CUDA; on a CPU there is nothing to wait for.
dflash.model._cuda_time = time.perf_counter
torch.set_num_threads(int(sys.argv[4]) if len(sys.argv) > 4 else 1)

directory, name, task = sys.argv[1], sys.argv[2], json.loads(Path(sys.argv[3]).read_text())
drafter = load(directory)
target, _ = load_target(resolve_target(name))
answers = []
for prompt in task["prompts"]:
    out = dflash_generate(
        drafter, target, torch.tensor([prompt]), task["max_new_tokens"], task["stops"], return_stats=True
    )
    answers.append({"tokens": out.output_ids[0, len(prompt) :].tolist(), "produced": out.acceptance_lengths})
json.dump(answers, sys.stdout)
