"""How much building costs beside the target's bare forward pass with logits of every position, on the same batches.

    python -m benchmarks.build [--target smollm2-135m] [--documents 32] [--features sketch] [--rounds 5] ...

Documents are prompts of the standard library, the second half of each supervised. The builder runs the target's body,
keeps five taps, runs the head, logsumexp and top-k on supervised rows only, encodes, compresses, digests and writes
shards, on a GPU beside the next one's passes. The bare pass is `model(ids)` and nothing else. The two alternate round
by round. `--target random-llama-3-8b` is a random model of that one's sizes, and its documents are random tokens.
Threads of one product wait for each other, and so for whatever else a shared machine does: more than one are worth
measuring on an idle one. Ends with one JSON line.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import finish, ratios, shown, spread
from benchmarks.targets import find_target, prepare, texts
from cache_builder.document import BuiltDocument
from cache_builder.shard_writer import ShardWriter
from cache_builder.target import Target
from cache_builder.teacher import batches, read_all
from cache_builder.writer import StorageSpec, write_shard
from specauf.progress import progress

Documents = list[tuple[np.ndarray, np.ndarray]]


@dataclass
class Clock:
    """Seconds by the wall and of the processor, by round."""

    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)

    def time(self, work: Callable[[], object]) -> None:
        """Add what some work takes."""
        started, busy = time.perf_counter(), time.process_time()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.wall.append(time.perf_counter() - started)
        self.processor.append(time.process_time() - busy)


@torch.inference_mode()
def bare(target: Target, shards: list[Documents], batch_tokens: int) -> None:
    """The target's own forward pass over the same batches: logits of every position and no more."""
    for documents in shards:
        lengths = [len(tokens) for tokens, _ in documents]
        for numbers in batches(sorted(range(len(lengths)), key=lengths.__getitem__), lengths, batch_tokens):
            ids = torch.zeros((len(numbers), max(lengths[i] for i in numbers)), dtype=torch.int64)
            for row, i in enumerate(numbers):
                ids[row, : lengths[i]] = torch.from_numpy(documents[i][0])
            target.model(ids.to(target.device), use_cache=False)


def build(target: Target, shards: list[Documents], batch_tokens: int, spec: StorageSpec, folder: str) -> None:
    """What the builder does of one round: shards on disk."""

    def write(number: int, documents: list[BuiltDocument]) -> None:
        write_shard(folder, number, documents, spec)

    with ShardWriter(write, beside=target.device.type == "cuda") as writer:
        for number, documents in enumerate(shards):
            found = read_all(target, documents, batch_tokens=batch_tokens, features=spec.codec.kind != "none")
            writer(
                number,
                [
                    BuiltDocument(tokens, mask, np.flatnonzero(mask) - 1, ids, values, kept, held_out=False)
                    for (tokens, mask), (ids, values, kept) in zip(documents, found, strict=True)
                ],
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--features", default="sketch", choices=("none", "bf16", "int8", "sketch"))
    parser.add_argument("--documents", type=int, default=32)
    parser.add_argument("--length", type=int, default=256, help="tokens of a document at most")
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-tokens", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="instead of the target's own")
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    target = find_target(args.target, args.device, args.dtype)
    documents = [
        (tokens, np.arange(len(tokens)) >= max(1, len(tokens) // 2))
        for tokens in texts(target, args.documents, args.length)
    ]
    spec = prepare(target, documents, args.features, args.batch_tokens)
    shards = [documents[n :: args.shards] for n in range(args.shards)]
    clocks = {"builder": Clock(), "bare": Clock()}
    with (
        tempfile.TemporaryDirectory(prefix="specauf-build-") as place,
        progress("build", float(args.rounds), unit="rounds", initial=0.0) as advance,
    ):
        bare(target, shards[:1], args.batch_tokens)  # warm
        build(target, shards[:1], args.batch_tokens, spec, str(Path(place, "warm")))
        for number in range(args.rounds):
            folder = str(Path(place, str(number)))
            sides: dict[str, Callable[[], None]] = {
                "builder": lambda folder=folder: build(target, shards, args.batch_tokens, spec, folder),
                "bare": lambda: bare(target, shards, args.batch_tokens),
            }
            for name in sorted(sides, reverse=number % 2 == 0):
                clocks[name].time(sides[name])
            advance(1)
    report(clocks, sum(len(tokens) for tokens, _ in documents), args)


def report(clocks: dict[str, Clock], tokens: int, args: argparse.Namespace) -> None:
    """Print tokens per second and their ratio, then one JSON line."""
    builder, plain = clocks["builder"], clocks["bare"]
    print(
        f"{args.target}, {args.documents} documents, {tokens:,} tokens, features {args.features}, "
        f"{args.rounds} rounds, {args.threads} threads"
    )
    speed = {name: [tokens / seconds for seconds in clock.wall] for name, clock in clocks.items()}
    for name, values in speed.items():
        print(f"  {name:<8} {shown(spread(values), 0)} tokens/s")
    ratio = {"speed": ratios(plain.wall, builder.wall), "processor": ratios(plain.processor, builder.processor)}
    for name, figures in ratio.items():
        print(f"  builder / bare, by {name}: {shown(figures)}")
    settings = {k: v for k, v in vars(args).items() if k != "json"}
    per_second = {name: statistics.median(values) for name, values in speed.items()}
    finish({"benchmark": "build", **settings, "tokens": tokens, "tokens_per_second": per_second, **ratio}, args.json)


if __name__ == "__main__":
    main()
