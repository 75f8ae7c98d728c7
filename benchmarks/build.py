"""Building beside the target's bare forward pass with full logits: same tokens, same batches.

    python -m benchmarks.build [--target smollm2-135m] [--documents 32] [--features sketch] [--rounds 3]

Documents are prompts of the standard library, the second half of each supervised. The builder runs the target's body,
keeps five taps, runs the head, logsumexp and top-k on supervised rows only, encodes, compresses, digests and writes the
shard. The bare pass is `model(ids)` and nothing else. Rounds of the two alternate. Ends with one JSON line.
"""

import argparse
import json
import statistics
import tempfile
import time
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
BATCH_TOKENS = 4096


@torch.inference_mode()
def bare(target: Target, documents: Documents) -> None:
    """The target's own forward pass, logits of every position and no more."""
    lengths = [len(tokens) for tokens, _ in documents]
    for numbers in batches(sorted(range(len(documents)), key=lengths.__getitem__), lengths, BATCH_TOKENS):
        ids = torch.zeros((len(numbers), max(lengths[i] for i in numbers)), dtype=torch.int64)
        for row, i in enumerate(numbers):
            ids[row, : lengths[i]] = torch.from_numpy(documents[i][0])
        target.model(ids.to(target.device), use_cache=False)


def build(target: Target, documents: Documents, spec: StorageSpec, folder: str) -> None:
    """What the builder does for one shard."""
    read = read_all(target, documents, batch_tokens=BATCH_TOKENS, features=spec.codec.kind != "none")
    made = [
        BuiltDocument(tokens, mask, np.flatnonzero(mask) - 1, ids, values, features, held_out=False)
        for (tokens, mask), (ids, values, features) in zip(documents, read, strict=True)
    ]
    write_shard(folder, 0, made, spec)


def prepare(target: Target, documents: Documents, kind: str) -> StorageSpec:
    """Fit how features are stored on the documents themselves; not timed, for a build does it once."""
    rank = target.hidden_size if kind == "sketch" else 0
    who = Identity(
        {"id": target.name}, "", "", target.vocab_size, target.hidden_size, target.num_layers, tuple(target.taps),
        target.k, None, 0, "float32", kind, rank, {}, {}, "0",  # type: ignore[arg-type]
    )  # fmt: skip
    if kind not in ("int8", "sketch"):
        return StorageSpec(who, FeatureCodec(kind, len(target.taps)))  # type: ignore[arg-type]
    features = [f for _, _, f in read_all(target, documents, batch_tokens=BATCH_TOKENS) if f is not None]
    codec = fit_features(torch.cat(features).float(), kind, len(target.taps), rank)  # type: ignore[arg-type]
    return StorageSpec(who, codec)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--features", default="sketch", choices=("none", "bf16", "int8", "sketch"))
    parser.add_argument("--documents", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    config = resolve_target(args.target)
    target = Target(*load_target(config), config, k=32)
    documents: Documents = []
    for prompt in stdlib_prompts()[: args.documents]:
        tokens = np.asarray(target.tokenizer(prompt)["input_ids"][:256], dtype=np.int64)
        documents.append((tokens, np.arange(len(tokens)) >= max(1, len(tokens) // 2)))
    spec, count = prepare(target, documents, args.features), sum(len(tokens) for tokens, _ in documents)
    speed: dict[str, list[float]] = {"builder": [], "bare": []}
    with tempfile.TemporaryDirectory() as place, progress("build", float(args.rounds), unit="rounds") as advance:
        for number in range(args.rounds):
            for name in speed if number % 2 else reversed(speed):
                started = time.perf_counter()
                if name == "bare":
                    bare(target, documents)
                else:
                    build(target, documents, spec, str(Path(place, str(number))))
                speed[name].append(count / (time.perf_counter() - started))
            advance(1)
    ratios = [a / b for a, b in zip(speed["builder"], speed["bare"], strict=True)]
    print(
        f"{args.target}, {len(documents)} documents, {count:,} tokens, features {args.features}, {args.rounds} rounds"
    )
    for name, values in speed.items():
        print(f"  {name:<8} {statistics.median(values):,.0f} tokens/s ({min(values):,.0f} to {max(values):,.0f})")
    print(f"  builder / bare {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    figures = {"benchmark": "build", "tokens": count, "tokens_per_second": speed, "ratio": statistics.median(ratios)}
    print(json.dumps(figures | {"ratio_range": [min(ratios), max(ratios)]}))


if __name__ == "__main__":
    main()
