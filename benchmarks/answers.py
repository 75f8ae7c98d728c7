"""Answering prompts as the builder does, stored with top-k and features, beside transformers' plain `generate`.

    python -m benchmarks.answers [--documents 64] [--batch 32] [--new 64] [--rounds 3] [--threads 2] ...

The same prompts of the standard library, sorted by length, in the same batches, greedily; `generate` pads on the left.
The builder also runs the head's logsumexp and top-32, keeps five taps, and encodes and writes the shard; fitting the
features is left out, for a build does it once. The two alternate round by round. `--target random-llama-3-8b` is a
random model of that one's sizes, and its prompts are random tokens. Ends with one JSON line.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import finish, ratios, shown, spread
from benchmarks.targets import find_target, prepare, texts
from cache_builder.document import BuiltDocument
from cache_builder.generate import answer_all
from cache_builder.target import Target
from cache_builder.writer import StorageSpec, write_shard
from specauf.progress import progress

Prompts = list[np.ndarray]


def build(target: Target, prompts: Prompts, spec: StorageSpec, folder: str, args: argparse.Namespace) -> Prompts:
    """The builder's way: answers, and a shard on disk."""
    kind = spec.codec.kind
    answers = answer_all(target, prompts, max_new_tokens=args.new, batch_size=args.batch, features=kind != "none")
    documents = []
    for a in answers:
        mask = np.arange(len(a.tokens)) >= a.prompt_tokens
        rows = np.flatnonzero(mask) - 1
        documents.append(BuiltDocument(a.tokens, mask, rows, a.topk_ids, a.topk_logprobs, a.features))
    write_shard(folder, 0, documents, spec)
    return [a.tokens for a in answers]


def generate(target: Target, prompts: Prompts, args: argparse.Namespace) -> Prompts:
    """Transformers' way: answers, and no more."""
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    found: dict[int, np.ndarray] = {}
    for end in range(len(order), 0, -args.batch):
        numbers = order[max(0, end - args.batch) : end]
        width = max(len(prompts[i]) for i in numbers)
        ids = torch.zeros((len(numbers), width), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(numbers):
            ids[row, width - len(prompts[i]) :] = torch.from_numpy(prompts[i])
            mask[row, width - len(prompts[i]) :] = 1
        out = target.model.generate(
            ids.to(target.device), attention_mask=mask.to(target.device), max_new_tokens=args.new, do_sample=False,
            pad_token_id=0,
        ).cpu()  # fmt: skip
        for row, i in enumerate(numbers):
            answer = out[row, width:]
            ended = torch.isin(answer, torch.tensor(sorted(target.stop_ids))).nonzero()
            length = int(ended[0]) + 1 if len(ended) else len(answer)
            found[i] = np.concatenate([prompts[i], answer[:length].numpy()])
    return [found[i] for i in range(len(prompts))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--features", default="sketch", choices=("none", "bf16", "int8", "sketch"))
    defaults = {"documents": 64, "batch": 32, "new": 64, "rounds": 3, "threads": 2}
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--length", type=int, default=256, help="tokens of a random target's prompts at most")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="instead of the target's own")
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    target = find_target(args.target, args.device, args.dtype)
    prompts = texts(target, args.documents, args.length, chat=True)
    masks = [np.arange(len(p)) >= len(p) // 2 for p in prompts]
    spec = prepare(target, list(zip(prompts, masks, strict=True)), args.features, batch_tokens=8192)
    seconds: dict[str, list[float]] = {"builder": [], "generate": []}
    said: dict[str, Prompts] = {}

    def timed(name: str, work: Any) -> None:
        started = time.perf_counter()
        said[name] = work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds[name].append(time.perf_counter() - started)

    with (
        tempfile.TemporaryDirectory(prefix="specauf-answers-") as place,
        progress("answers", float(args.rounds), unit="rounds", initial=0.0) as advance,
    ):
        brief = argparse.Namespace(**vars(args) | {"new": 2})
        build(target, prompts[: args.batch], spec, str(Path(place, "warm")), brief)
        generate(target, prompts[: args.batch], brief)
        for number in range(args.rounds):
            folder = str(Path(place, str(number)))
            sides = {
                "builder": lambda folder=folder: build(target, prompts, spec, folder, args),
                "generate": lambda: generate(target, prompts, args),
            }
            for name in sorted(sides, reverse=number % 2 == 1):
                timed(name, sides[name])
            advance(1)
    tokens = sum(len(said["builder"][i]) - len(prompts[i]) for i in range(len(prompts)))
    same = sum(np.array_equal(a, b) for a, b in zip(said["builder"], said["generate"], strict=True))
    print(
        f"{args.target}, {len(prompts)} prompts, {tokens:,} tokens answered, batches of {args.batch}, {args.features}"
    )
    for name, values in seconds.items():
        print(f"  {name:<9} {shown(spread([tokens / s for s in values]), 0)} tokens/s")
    ratio = ratios(seconds["generate"], seconds["builder"])
    print(f"  builder / generate: {shown(ratio)}; the same answer to {same} of {len(prompts)} prompts", flush=True)
    settings = {k: v for k, v in vars(args).items() if k != "json"}
    finish(
        {"benchmark": "answers", **settings, "tokens": tokens, "seconds": seconds, "ratio": ratio, "same": same},
        args.json,
    )


if __name__ == "__main__":
    sys.exit(main())
