"""Runs in the environment `dflash_mlx`: decode prompts with the MLX half of z-lab's package.

Arguments: drafter directory, target (directory or YAML file of one), JSON file with `prompts`, `max_new_tokens` and
`stops`. Prints a JSON list with `tokens` and `produced` (emitted tokens of every cycle) of each prompt.
"""

import json
import sys
from pathlib import Path

import mlx_lm
from dflash.model_mlx import stream_generate
from mlx_lm.tokenizer_utils import TokenizerWrapper

from specauf.targets import resolve_target
from tests.interop.dflash_mlx_models import load_draft

directory, name, task = sys.argv[1], sys.argv[2], json.loads(Path(sys.argv[3]).read_text())
folder = Path(resolve_target(name).model)
# mlx-lm knows the base of rotary embeddings only where transformers 4 wrote it.
rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
model, tokenizer = mlx_lm.load(str(folder), model_config={"rope_theta": rope["rope_theta"]})
tokenizer = TokenizerWrapper(tokenizer._tokenizer, eos_token_ids=task["stops"])
drafter = load_draft(directory)
answers = []
for prompt in task["prompts"]:
    steps = list(stream_generate(model, drafter, tokenizer, prompt, max_tokens=task["max_new_tokens"]))
    answers.append(
        {
            "tokens": [token for step in steps for token in step.tokens],
            # The prompt's own token and the closing word belong to no cycle.
            "produced": [step.accepted for step in steps if step.accepted is not None],
        }
    )
json.dump(answers, sys.stdout)
