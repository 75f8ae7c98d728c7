"""Real greedy decoding of many drafters on the same prompts, several prompts at once; kept as small JSON files."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specauf.checkpoint import load_drafter
from specauf.decoding.speculative import speculative_generate_batch
from specauf.drafters import Drafter, TargetVocabulary
from specauf.errors import UserError
from specauf.evaluation.benchmarks import benchmark_name, load_benchmark
from specauf.evaluation.environment import environment
from specauf.evaluation.run import encode
from specauf.linear import use_onednn
from specauf.progress import progress
from specauf.targets import load_target, resolve_target
from studies.plan import Decoding


class Decoder:
    """The target with its prompts and plain answers, which every drafter is held against.

    Args:
        target: name in configs/target/.
        decoding: the study's.
        answers: file that keeps the plain answers.
    """

    def __init__(self, target: str, decoding: Decoding, answers: Path) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        config = resolve_target(target)
        self.model, tokenizer = load_target(config, device=self.device)
        self.vocabulary = TargetVocabulary.from_target(self.model)
        self.decoding = decoding
        self.prompts: dict[str, list[tuple[str, Tensor]]] = {
            benchmark_name(name): [
                (p.task_id, encode(tokenizer, p.text, config.template_options)[0])
                for p in load_benchmark(name, decoding.limit)
            ]
            for name in decoding.benchmarks
        }
        self.plain = self._plain(answers)

    def decode(self, run: Path) -> dict[str, Any]:
        """Accepted drafts of every prompt with the best drafter of a run directory, per benchmark."""
        drafter = load_drafter(run).to(self.device).eval().requires_grad_(False)
        use_onednn(drafter)
        found = {}
        for name, prompts in self.prompts.items():
            results = [r for batch in self._batches(prompts) for r in self._answers(drafter, batch)]
            found[name] = {
                "task_id": [task for task, _ in prompts],
                "accepted": [sum(r.accepted) for r in results],
                "cycles": [len(r.accepted) for r in results],
                "reached": _reached([a for r in results for a in r.accepted], drafter.config.block_size - 1),
                "identical": sum(list(r.tokens) == plain for r, plain in zip(results, self.plain[name], strict=True)),
            }
        # A benchmark's name, and not the place of its file on this machine.
        decoding = vars(self.decoding) | {"benchmarks": list(self.prompts)}
        return {"benchmarks": found, "decoding": decoding, **environment(self.device)}

    def _plain(self, file: Path) -> dict[str, list[list[int]]]:
        key = {name: [ids.tolist() for _, ids in prompts] for name, prompts in self.prompts.items()}
        if file.is_file():
            kept = json.loads(file.read_text())
            if kept["prompts"] == key and kept["max_new_tokens"] == self.decoding.max_new_tokens:
                return dict(kept["answers"])
            raise UserError(f"{file} holds answers to other prompts: delete it, or name the study otherwise")
        answers: dict[str, list[list[int]]] = {}
        with progress("plain answers", sum(map(len, self.prompts.values())), unit="prompts") as advance:
            for name, prompts in self.prompts.items():
                answers[name] = []
                for batch in self._batches(prompts):
                    answers[name] += [list(r.tokens) for r in self._answers(None, batch)]
                    advance(len(batch))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(
            json.dumps({"prompts": key, "max_new_tokens": self.decoding.max_new_tokens, "answers": answers}) + "\n"
        )
        return answers

    def _batches(self, prompts: Sequence[tuple[str, Tensor]]) -> Iterator[Sequence[tuple[str, Tensor]]]:
        for start in range(0, len(prompts), self.decoding.batch_size):
            yield prompts[start : start + self.decoding.batch_size]

    def _answers(self, drafter: Drafter | None, batch: Sequence[tuple[str, Tensor]]) -> list[Any]:
        return speculative_generate_batch(
            self.model,
            drafter,
            [ids for _, ids in batch],
            max_new_tokens=self.decoding.max_new_tokens,
            vocabulary=self.vocabulary,
        )


def _reached(accepted: list[int], slots: int) -> list[int]:
    """Cycles that accepted at least k drafts, k = 0..slots."""
    return torch.bincount(torch.tensor(accepted), minlength=slots + 1).flip(0).cumsum(0).flip(0).tolist()
