"""Decoding speed against z-lab's package `dflash`, with the same drafter and target, interleaved prompt by prompt.

    python -m benchmarks.decode DRAFTER [--target smollm2-135m] [--prompts 32] [--new 96]

The package is not a dependency: name an interpreter that has it with --python, or leave it out to let
`tests.interop.environments` make one. It runs in a process of its own that answers one prompt at a time, so that both
meet the same machine; the order alternates. Ends with one JSON line.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from specauf.checkpoint import load_drafter
from specauf.decoding import speculative_generate
from specauf.drafters import DFlashDrafter, DrafterConfig, TargetVocabulary
from specauf.evaluation.benchmarks import load_benchmark
from specauf.evaluation.results import environment
from specauf.evaluation.run import encode
from specauf.linear import use_onednn
from specauf.targets import load_target, mask_token_id, resolve_target

# Runs with the other package: a prompt a line in, tokens, emitted lengths and seconds a line out.
PEER = """
import json, sys, time
import dflash.model, torch
from dflash.model import DFlashDraftModel, dflash_generate
from specauf.targets import load_target, resolve_target
dflash.model._cuda_time = time.perf_counter  # its statistics wait for CUDA
directory, name, threads, new = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(threads)
drafter = DFlashDraftModel.from_pretrained(directory, dtype=torch.float32).eval()
target, _ = load_target(resolve_target(name))
stops = target.generation_config.eos_token_id
stops = stops if isinstance(stops, list) else [stops]
print("ready", flush=True)
for line in sys.stdin:
    prompt = json.loads(line)
    started, cpu = time.perf_counter(), time.process_time()
    out = dflash_generate(drafter, target, torch.tensor([prompt]), new, stops, return_stats=True)
    times = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}
    answer = {"tokens": out.output_ids[0, len(prompt):].tolist(), "emitted": list(out.acceptance_lengths)}
    print(json.dumps(answer | times), flush=True)
"""


def compared(accepted: list[int], emitted: list[int], block: int, tokens: int, new: int) -> tuple[list[int], list[int]]:
    """Emitted lengths of the cycles that both decode with a whole block.

    Where fewer tokens than a block are left, z-lab's loop drafts a shorter block, and the cycle that the answer's end
    cuts is counted uncut.
    """
    sides = []
    for produced in ([a + 1 for a in accepted], emitted):
        starts = np.concatenate([[1], 1 + np.cumsum(produced)[:-1]]).tolist()
        pairs = zip(starts, produced, strict=True)
        sides.append([p for s, p in pairs if s + block <= new and s + p < tokens])
    return sides[0], sides[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("drafter", nargs="?", help="run or drafter directory; a random drafter when left out")
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--new", type=int, default=96)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--python", help="an interpreter with the package dflash")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    about = resolve_target(args.target)
    target, tokenizer = load_target(about)
    vocabulary = TargetVocabulary.from_target(target)
    if args.drafter:
        drafter = load_drafter(Path(args.drafter)).eval()
    else:
        mask = mask_token_id(about, tokenizer, target.config.vocab_size)
        torch.manual_seed(0)
        drafter = DFlashDrafter(
            DrafterConfig.from_target(target.config.to_dict(), taps=about.taps or (), mask_token_id=mask)
        ).eval()
    assert isinstance(drafter, DFlashDrafter)
    use_onednn(drafter.requires_grad_(False))
    python = args.python
    if python is None:
        from tests.interop.environments import python_of

        python = str(python_of("dflash"))
    prompts = [encode(tokenizer, p.text) for p in load_benchmark("humaneval", args.prompts)]
    with tempfile.TemporaryDirectory() as folder:
        drafter.save_pretrained(folder, dtype=torch.float32)
        command = [python, "-c", PEER, folder, args.target, str(args.threads), str(args.new)]
        peer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            figures = _measure(peer, target, drafter, vocabulary, prompts, args.new)
        finally:
            peer.terminate()
            peer.wait()
    print(json.dumps(figures | {"target": args.target, "new_tokens": args.new, **environment()}))


def _measure(
    peer: Any, target: Any, drafter: DFlashDrafter, vocabulary: TargetVocabulary, prompts: list[torch.Tensor], new: int
) -> dict[str, Any]:
    assert peer.stdout.readline().strip() == "ready"

    def theirs(ids: torch.Tensor) -> dict[str, Any]:
        peer.stdin.write(json.dumps(ids[0].tolist()) + "\n")
        peer.stdin.flush()
        answer: dict[str, Any] = json.loads(peer.stdout.readline())
        return answer

    def ours(ids: torch.Tensor) -> tuple[Any, dict[str, float]]:
        started, cpu = time.perf_counter(), time.process_time()
        result = speculative_generate(target, drafter, ids, max_new_tokens=new, vocabulary=vocabulary)
        return result, {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}

    theirs(prompts[0])
    ours(prompts[0])  # both warm
    tokens, seconds, cpu, same, cycles = [], [], [], True, 0
    for number, ids in enumerate(prompts):
        if number % 2:
            (mine, own), other = ours(ids), theirs(ids)
        else:
            other, (mine, own) = theirs(ids), ours(ids)
        one, two = compared(mine.accepted, other["emitted"], drafter.config.block_size, len(mine.tokens), new)
        same = same and one == two and list(mine.tokens) == other["tokens"]
        cycles += len(one)
        tokens.append((len(mine.tokens), len(other["tokens"])))
        seconds.append((own["seconds"], other["seconds"]))
        cpu.append((own["cpu_seconds"], other["cpu_seconds"]))
        print(
            f"{number + 1}/{len(prompts)}: ours {own['seconds']:.2f} s, theirs {other['seconds']:.2f} s",
            file=sys.stderr,
        )
    t, s, c = np.array(tokens, float), np.array(seconds), np.array(cpu)
    draws = np.random.default_rng(0).integers(0, len(t), (2000, len(t)))
    ratios = (t[draws, 0].sum(1) / s[draws, 0].sum(1)) / (t[draws, 1].sum(1) / s[draws, 1].sum(1))
    speed = t.sum(0) / s.sum(0)
    return {
        "prompts": len(prompts),
        "cycles_compared": cycles,
        "same_cycles_and_tokens": same,
        "tokens_per_second": speed[0],
        "dflash_tokens_per_second": speed[1],
        "ratio": speed[0] / speed[1],
        # Of processor time: on a machine that does other work, the fairer one.
        "cpu_ratio": float(np.divide(*(t.sum(0) / c.sum(0)))),
        "ratio_95": np.quantile(ratios, [0.025, 0.975]).tolist(),
    }


if __name__ == "__main__":
    main()
