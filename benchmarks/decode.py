"""Decoding speed against z-lab's package `dflash` with the same drafter, and against `generate`, in turn.

    python -m benchmarks.decode DRAFTER [--target smollm2-135m] [--prompts 32] [--new 96]

The package is not a dependency: name an interpreter that has it with --python, or leave it out to let
`tests.interop.environments` make one. It runs in a process of its own that answers one prompt at a time, so that all
meet the same machine; the order rotates. On every side frozen products go through oneDNN where the CPU gains by it.
`lookup` is transformers' own drafting from the prompt, `generate(prompt_lookup_num_tokens=10)`. --block makes our side
decode with shorter blocks too, as `ours short`. Ends with one JSON line.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.common import finish
from specauf.checkpoint import load_drafter
from specauf.decoding import speculative_generate
from specauf.drafters import DFlashDrafter, DrafterConfig, TargetVocabulary
from specauf.evaluation.benchmarks import load_benchmark
from specauf.evaluation.environment import environment
from specauf.evaluation.run import encode
from specauf.linear import use_onednn
from specauf.targets import load_target, mask_token_id, resolve_target

# Runs with the other package: a prompt a line in, tokens, emitted lengths and seconds a line out.
PEER = """
import json, sys, time
from dataclasses import replace
import dflash.model, torch
from dflash.model import DFlashDraftModel, dflash_generate
from specauf.linear import use_onednn
from specauf.targets import load_target, resolve_target
dflash.model._cuda_time = time.perf_counter  # its statistics wait for CUDA
directory, name, threads, new, device, dtype = *sys.argv[1:3], int(sys.argv[3]), int(sys.argv[4]), *sys.argv[5:]
torch.set_num_threads(threads)
drafter = DFlashDraftModel.from_pretrained(directory, dtype=getattr(torch, dtype)).to(device).eval()
use_onednn(drafter.requires_grad_(False))
target, _ = load_target(replace(resolve_target(name), dtype=dtype), device=device)
stops = target.generation_config.eos_token_id
stops = stops if isinstance(stops, list) else [stops]
print("ready", flush=True)
for line in sys.stdin:
    prompt = json.loads(line)
    started, cpu = time.perf_counter(), time.process_time()
    out = dflash_generate(drafter, target, torch.tensor([prompt], device=device), new, stops, return_stats=True)
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
    parser.add_argument("--block", type=int, default=4, help="slots of our shorter blocks")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--python", help="an interpreter with the package dflash")
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    about = replace(resolve_target(args.target), dtype=args.dtype)
    target, tokenizer = load_target(about, device=args.device)
    vocabulary = TargetVocabulary.from_target(target)
    if args.drafter:
        drafter = load_drafter(args.drafter)
    else:
        mask = mask_token_id(about, tokenizer, target.config.vocab_size)
        torch.manual_seed(0)
        drafter = DFlashDrafter(
            DrafterConfig.from_target(target.config.to_dict(), taps=about.taps or (), mask_token_id=mask)
        ).eval()
    assert isinstance(drafter, DFlashDrafter)
    drafter.to(args.device, target.dtype)
    use_onednn(drafter.requires_grad_(False))
    python = args.python
    if python is None:
        from tests.interop.environments import python_of

        python = str(python_of("dflash"))
    texts = [p.text for p in load_benchmark("humaneval", args.prompts)]
    prompts = [encode(tokenizer, text, about.template_options).to(args.device) for text in texts]
    with tempfile.TemporaryDirectory() as folder:
        drafter.save_pretrained(folder, dtype=target.dtype)
        command = [python, "-c", PEER, folder, args.target, str(args.threads), str(args.new), args.device, args.dtype]
        peer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            figures = _measure(peer, target, drafter, vocabulary, prompts, args.new, args.block)
        finally:
            peer.terminate()
            peer.wait()
    settings = {"target": args.target, "new_tokens": args.new, "dtype": args.dtype, **environment(args.device)}
    finish({"benchmark": "decode", **settings, **figures}, args.json)


def _measure(
    peer: Any,
    target: Any,
    drafter: DFlashDrafter,
    vocabulary: TargetVocabulary,
    prompts: list[torch.Tensor],
    new: int,
    block: int,
) -> dict[str, Any]:
    assert peer.stdout.readline().strip() == "ready"

    def dflash(ids: torch.Tensor) -> dict[str, Any]:
        peer.stdin.write(json.dumps(ids[0].tolist()) + "\n")
        peer.stdin.flush()
        answer: dict[str, Any] = json.loads(peer.stdout.readline())
        return answer

    def timed(answer: Callable[[], tuple[list[int], list[int]]]) -> dict[str, Any]:
        started, cpu = time.perf_counter(), time.process_time()
        tokens, accepted = answer()
        seconds = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}
        return {"tokens": tokens, "accepted": accepted, **seconds}

    def ours(ids: torch.Tensor, **more: Any) -> dict[str, Any]:
        def answer() -> tuple[list[int], list[int]]:
            found = speculative_generate(target, drafter, ids, max_new_tokens=new, vocabulary=vocabulary, **more)
            return list(found.tokens), list(found.accepted)

        return timed(answer)

    def generate(ids: torch.Tensor, **more: Any) -> dict[str, Any]:
        def answer() -> tuple[list[int], list[int]]:
            mask = torch.ones_like(ids)
            out = target.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, **more)
            return out[0, ids.shape[1] :].tolist(), []

        return timed(answer)

    sides: dict[str, Callable[[torch.Tensor], dict[str, Any]]] = {
        "ours": ours,
        "dflash": dflash,
        "ours short": partial(ours, block_size=block),
        "generate": generate,
        "lookup": partial(generate, prompt_lookup_num_tokens=10),
    }
    for side in sides.values():
        side(prompts[0])  # warm
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for number, ids in enumerate(prompts):
        names = list(sides)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            found[name].append(sides[name](ids))
        times = ", ".join(f"{name} {rows[-1]['seconds']:.2f} s" for name, rows in found.items())
        print(f"{number + 1}/{len(prompts)}: {times}", file=sys.stderr)
    return _figures(found, drafter.config.block_size, new, block)


def _figures(found: dict[str, list[dict[str, Any]]], block_size: int, new: int, short: int) -> dict[str, Any]:
    """Speeds of all sides, and ours as ratios with their intervals over prompts."""
    ours = found["ours"]
    same, cycles = True, 0
    for mine, other in zip(ours, found["dflash"], strict=True):
        one, two = compared(mine["accepted"], other["emitted"], block_size, len(mine["tokens"]), new)
        same = same and one == two
        cycles += len(one)
    tokens = np.array([len(row["tokens"]) for row in ours], float)
    seconds = {name: np.array([row["seconds"] for row in rows]) for name, rows in found.items()}
    draws = np.random.default_rng(0).integers(0, len(tokens), (2000, len(tokens)))

    def ratio(fast: str, slow: str) -> list[float]:
        spread = seconds[slow][draws].sum(1) / seconds[fast][draws].sum(1)
        return [seconds[slow].sum() / seconds[fast].sum(), *np.quantile(spread, [0.025, 0.975]).tolist()]

    return {
        "prompts": len(ours),
        "cycles_compared": cycles,
        "same_cycles": same,
        "same_tokens": {
            name: [r["tokens"] for r in rows] == [r["tokens"] for r in ours] for name, rows in found.items()
        },
        "tokens_per_second": {name: tokens.sum() / value.sum() for name, value in seconds.items()},
        "ratio_to_dflash": ratio("ours", "dflash"),
        # Of processor time: on a machine that does other work, the fairer one.
        "cpu_ratio_to_dflash": sum(r["cpu_seconds"] for r in found["dflash"]) / sum(r["cpu_seconds"] for r in ours),
        "short_block": short,
        **{f"short_to_{name}": ratio("ours short", name) for name in ("generate", "lookup")},
    }


if __name__ == "__main__":
    main()
