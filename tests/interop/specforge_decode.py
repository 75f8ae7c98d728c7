"""Runs in the environment `specforge`: decode prompts with its `spec_generate`.

Arguments and output are those of `dflash_decode.py`.
"""

import json
import sys
from pathlib import Path

import specforge.modeling.draft.dflash
import torch
from transformers import DynamicCache

from specauf.targets import load_target, resolve_target
from tests.interop.specforge_models import load


class CroppedToLength(DynamicCache):
    """The cache as its transformers (5.8.1) had it: `crop` is told what stays; later ones are told what goes."""

    def crop(self, length: int) -> None:
        """Keep the first tokens."""
        if length < self.get_seq_length():
            super().crop(length - self.get_seq_length())


specforge.modeling.draft.dflash.DynamicCache = CroppedToLength
torch.set_num_threads(int(sys.argv[4]) if len(sys.argv) > 4 else 1)
directory, name, task = sys.argv[1], sys.argv[2], json.loads(Path(sys.argv[3]).read_text())
drafter = load(directory)
starts: list[int] = []
# It does not say what a cycle produced; the position of each block's anchor does.
drafter.register_forward_pre_hook(
    lambda model, args, given: starts.append(int(given["position_ids"][0, -model.block_size])), with_kwargs=True
)
target, _ = load_target(resolve_target(name))
answers = []
for prompt in task["prompts"]:
    starts.clear()
    ids = drafter.spec_generate(target, torch.tensor([prompt]), task["max_new_tokens"], task["stops"], temperature=0.0)
    # What is known of the last cycle is that it reached the answer's end.
    ends = [*starts[1:], max(ids.shape[1], starts[-1] + 1)]
    produced = [end - start for start, end in zip(starts, ends, strict=True)]
    answers.append({"tokens": ids[0, len(prompt) :].tolist(), "produced": produced})
json.dump(answers, sys.stdout)
