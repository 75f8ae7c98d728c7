"""How much building costs beside the target's bare forward pass with logits of every position, on the same batches.

    python -m benchmarks.build [--target smollm2-135m] [--documents 32] [--features sketch] [--rounds 5] ...

Documents are prompts of the standard library, the second half of each supervised. The builder runs the target's body,
keeps five taps, runs the head, logsumexp and top-k on supervised rows only, encodes, compresses, digests and writes the
shard. The bare pass is `model(ids)` and nothing else. The two alternate batch by batch, so that what else the machine
does falls on both; writing a round's shard counts as the builder's. Threads of one product wait for each other, and so
for whatever else a shared machine does: more than one are worth measuring on an idle one. Ends with one JSON line.
"""

import argparse
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from cache_builder.document import BuiltDocument
from cache_builder.features import fit_features
from cache_builder.stdlib_corpus import stdlib_prompts
from cache_builder.target import Target
from cache_builder.teacher import batches, read_all
from cache_builder.writer import StorageSpec, write_shard
from specauf.cache import FeatureCodec, Identity
from specauf.progress import progress
from specauf.targets import load_target, resolve_target

Documents = list[tuple[np.ndarray, np.ndarray]]
BATCH_TOKENS = 512


@dataclass
class Clock:
    """Seconds by the wall and of the processor, by round."""

    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)

    def start_round(self) -> None:
        """Count for a new round."""
        self.wall.append(0.0)
        self.processor.append(0.0)

    def time(self, work: Callable[[], object]) -> None:
        """Add what some work takes to the present round."""
        started, busy = time.perf_counter(), time.process_time()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.wall[-1] += time.perf_counter() - started
        self.processor[-1] += time.process_time() - busy


@torch.inference_mode()
def bare(target: Target, documents: Documents) -> None:
    """The target's own forward pass over one batch: logits of every position and no more."""
    ids = torch.zeros((len(documents), max(len(tokens) for tokens, _ in documents)), dtype=torch.int64)
    for row, (tokens, _) in enumerate(documents):
        ids[row, : len(tokens)] = torch.from_numpy(tokens)
    target.model(ids.to(target.device), use_cache=False)


def read(target: Target, documents: Documents, features: bool) -> list[BuiltDocument]:
    """What the builder keeps of one batch."""
    together = len(documents) * max(len(tokens) for tokens, _ in documents)
    found = read_all(target, documents, batch_tokens=together, features=features)
    return [
        BuiltDocument(tokens, mask, np.flatnonzero(mask) - 1, ids, values, kept, held_out=False)
        for (tokens, mask), (ids, values, kept) in zip(documents, found, strict=True)
    ]


def prepare(target: Target, parts: list[Documents], kind: str) -> StorageSpec:
    """Fit how features are stored on the documents themselves; not timed, for a build does it once."""
    rank = target.hidden_size if kind == "sketch" else 0
    who = Identity(
        {"id": target.name}, "", "", target.vocab_size, target.hidden_size, target.num_layers, tuple(target.taps),
        target.k, None, 0, "float32", kind, rank, {}, {}, "0",  # type: ignore[arg-type]
    )  # fmt: skip
    if kind not in ("int8", "sketch"):
        return StorageSpec(who, FeatureCodec(kind, len(target.taps)), device=target.device)  # type: ignore[arg-type]
    features = [d.features for part in parts for d in read(target, part, features=True) if d.features is not None]
    codec = fit_features(torch.cat(features).float(), kind, len(target.taps), rank)  # type: ignore[arg-type]
    return StorageSpec(who, codec, device=target.device)


def one_round(
    target: Target,
    parts: list[Documents],
    spec: StorageSpec,
    clocks: dict[str, Clock],
    folder: str,
    *,
    builder_first: bool,
) -> None:
    """Both ways over all batches, in turn; then the builder writes its shard."""
    made: list[BuiltDocument] = []
    for clock in clocks.values():
        clock.start_round()

    def build_batch(part: Documents) -> None:
        made.extend(read(target, part, spec.codec.kind != "none"))

    def bare_batch(part: Documents) -> None:
        bare(target, part)

    for part in parts:
        for name in sorted(clocks, reverse=builder_first):
            work = build_batch if name == "builder" else bare_batch
            clocks[name].time(functools.partial(work, part))
        builder_first = not builder_first
    clocks["builder"].time(lambda: write_shard(folder, 0, made, spec))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--features", default="sketch", choices=("none", "bf16", "int8", "sketch"))
    parser.add_argument("--documents", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-tokens", type=int, default=BATCH_TOKENS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="instead of the target's own")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = resolve_target(args.target)
    config = replace(config, dtype=args.dtype or config.dtype)
    target = Target(*load_target(config, device=args.device), config, k=32)
    documents: Documents = []
    for prompt in stdlib_prompts()[: args.documents]:
        tokens = np.asarray(target.tokenizer(prompt)["input_ids"][:256], dtype=np.int64)
        documents.append((tokens, np.arange(len(tokens)) >= max(1, len(tokens) // 2)))
    lengths = [len(tokens) for tokens, _ in documents]
    order = sorted(range(len(documents)), key=lengths.__getitem__)
    parts = [[documents[i] for i in numbers] for numbers in batches(order, lengths, args.batch_tokens)]
    spec = prepare(target, parts, args.features)
    clocks = {"builder": Clock(), "bare": Clock()}
    with (
        tempfile.TemporaryDirectory(prefix="specauf-build-") as place,
        progress("build", float(args.rounds), unit="rounds", initial=0.0) as advance,
    ):
        for number in range(args.rounds):
            one_round(target, parts, spec, clocks, str(Path(place, str(number))), builder_first=number % 2 == 0)
            advance(1)
    report(clocks, sum(lengths), args)


def report(clocks: dict[str, Clock], tokens: int, args: argparse.Namespace) -> None:
    """Print tokens per second and their ratio, then one JSON line."""
    builder, plain = clocks["builder"], clocks["bare"]
    ratios = {
        "speed": [b / a for a, b in zip(builder.wall, plain.wall, strict=True)],
        "processor": [b / a for a, b in zip(builder.processor, plain.processor, strict=True)],
    }
    print(
        f"{args.target}, {args.documents} documents, {tokens:,} tokens, features {args.features}, "
        f"{args.rounds} rounds, {args.threads} threads"
    )
    speed = {name: [tokens / seconds for seconds in clock.wall] for name, clock in clocks.items()}
    for name, values in speed.items():
        print(f"  {name:<8} {statistics.median(values):,.0f} tokens/s ({min(values):,.0f} to {max(values):,.0f})")
    for name, values in ratios.items():
        print(f"  builder / bare, by {name}: {statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})")
    figures = {
        "benchmark": "build", "features": args.features, "tokens": tokens, "threads": args.threads,
        "device": args.device, "dtype": args.dtype,
        "tokens_per_second": {name: statistics.median(values) for name, values in speed.items()},
        "ratio": statistics.median(ratios["speed"]), "ratio_range": [min(ratios["speed"]), max(ratios["speed"])],
        "processor_ratio": statistics.median(ratios["processor"]),
    }  # fmt: skip
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
