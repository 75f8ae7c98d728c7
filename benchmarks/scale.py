"""How cost grows: with the corpus, with K, block size, anchors and ranks; time, peak memory and bytes.

    python -m benchmarks.scale [--most 1000000] [--plot docs/scale.png] ...

Caches are made up: one shard's documents, written over and over under the names of further shards. So a corpus of 10
million tokens (`--most 10000000`) takes minutes and not days. Every reading and every training step is measured in a
process of its own. Memory is the process's peak beyond what it held before; a reader's should not grow with the corpus.
Growth is the exponent of a power law fitted to all sizes: 1 is linear, 0 constant. Ends with one JSON line.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import answer, finish, forget_peak, growth, peak_bytes
from benchmarks.read import TAPS, NoTokenizer, made_up
from cache_builder.document import BuiltDocument
from cache_builder.features import fit_features
from cache_builder.writer import StorageSpec, begin, write_manifest, write_shard, write_target
from specauf.cache import Identity, open_cache

SHARD, TOKENS = 64, 160  # documents of a shard, mean tokens of a document
TARGET_FILES = "target"
STEP = {"length": 1024, "hidden": 256, "heads": 4, "kv-heads": 2, "intermediate": 768, "vocab": 16_384, "chunk": 16}
Row = dict[str, Any]


def documents_of(args: argparse.Namespace, k: int) -> list[BuiltDocument]:
    """One shard's documents, the same for every K but for the cut."""
    shape = {"documents": SHARD, "tokens": TOKENS, "hidden": args.hidden, "vocab": args.vocab, "features": "sketch"}
    whole = made_up(argparse.Namespace(**shape, k=max(*args.k, 32)))
    return [replace(d, topk_ids=d.topk_ids[:, :k], topk_logprobs=d.topk_logprobs[:, :k]) for d in whole]


def write_cache(folder: Path, args: argparse.Namespace, *, k: int, shards: int) -> Row:
    """Write one shard's documents as many shards; tokens, supervised tokens, bytes, and seconds of writing them."""
    documents = documents_of(args, k)
    who = Identity(
        {"id": "made-up", "fingerprint": "0"}, "", "", args.vocab, args.hidden, 30, tuple(range(TAPS)), k, None, 0,
        "float32", "sketch", args.hidden, {"name": "made-up"}, {}, "0",
    )  # fmt: skip
    sample = torch.cat([d.features for d in documents if d.features is not None])
    codec = fit_features(sample, "sketch", TAPS, args.hidden)
    begin(str(folder), who)
    write_target(
        str(folder), who, config={}, embed_tokens=torch.zeros(args.vocab, 1), lm_head=None, tokenizer=NoTokenizer(),
        codec=codec,
    )  # fmt: skip
    started = time.perf_counter()
    for number in range(shards):
        write_shard(str(folder), number, documents, StorageSpec(who, codec))
    write_manifest(str(folder), who, shards)
    seconds = time.perf_counter() - started
    counts = open_cache(str(folder)).manifest.counts
    return {
        "tokens": counts.tokens,
        "rows": counts.rows,
        "bytes": sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and p.parent.name != TARGET_FILES),
        "write_seconds": seconds,
    }


def read_part(url: str, rank: int, world: int, passes: int) -> Row:
    """Open a cache and read one rank's documents, shuffled, in this process."""
    forget_peak()
    before, seconds, tokens = peak_bytes(), [], 0
    cache = open_cache(url)
    for epoch in range(passes + 1):
        started, tokens = time.perf_counter(), 0
        for document in cache.documents(shuffle=True, epoch=epoch, rank=rank, world=world):
            assert document.topk_logprobs is not None
            assert document.training_features is not None
            tokens += len(document.tokens)
        seconds.append(time.perf_counter() - started)
    return {
        "read_tokens": tokens,
        "read_seconds": statistics.median(seconds[1:]),
        "reader_mib": (peak_bytes() - before) / 2**20,
    }


def reading(folder: Path, args: argparse.Namespace, rank: int = 0, world: int = 1) -> Row:
    """`read_part` in a process of its own."""
    part = ["--one", str(folder), str(rank), str(world)]
    return answer([sys.executable, "-m", "benchmarks.scale", "--passes", str(args.passes), *part])


def step(anchors: int, block_size: int) -> Row:
    """Seconds and memory of a training step, in a process of its own."""
    shape = {**STEP, "blocks": anchors, "block-size": block_size, "repeat": 3}
    words = [word for key, value in shape.items() for word in (f"--{key}", str(value))]
    row = answer([sys.executable, "-m", "benchmarks.step_sides", "decay", *words])["decay"][0]
    return {"step_seconds": row["seconds"], "step_mib": row["peak_mib"]}


def settings(args: argparse.Namespace, place: Path) -> Iterator[tuple[str, int, Row]]:
    """Name of what varies, its value, and the figures there."""
    tokens = 10_000
    while tokens <= args.most:
        folder = place / f"corpus-{tokens}"
        row = write_cache(folder, args, k=32, shards=round(tokens / (SHARD * TOKENS)) or 1)
        yield "corpus", row["tokens"], {**row, **reading(folder, args)}
        tokens *= 10
    largest = folder
    for k in args.k:
        row = write_cache(place / f"k-{k}", args, k=k, shards=args.shards)
        yield "k", k, {**row, **reading(place / f"k-{k}", args)}
    for world in args.ranks:
        yield "ranks", world, reading(largest, args, world // 2, world)
    for block_size in args.block_sizes:
        yield "block_size", block_size, step(64, block_size)
    for anchors in args.anchors:
        yield "anchors", anchors, step(anchors, 16)


def exponents(found: dict[str, list[tuple[int, Row]]]) -> dict[str, dict[str, float]]:
    """Growth of every positive figure against what varies; what has one size only is left out."""
    out: dict[str, dict[str, float]] = {}
    for name, rows in found.items():
        if len({size for size, _ in rows}) < 2:
            continue
        sizes = [float(size) for size, _ in rows]
        kept = [key for key in rows[0][1] if all(row[key] > 0 for _, row in rows)]
        out[name] = {key: growth(sizes, [row[key] for _, row in rows]) for key in kept}
    return out


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=1_000_000, help="tokens of the largest corpus; from 10,000 by tens")
    parser.add_argument("--k", type=int, nargs="+", default=[8, 16, 32, 64, 128])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--block-sizes", type=int, nargs="+", default=[4, 8, 16, 32, 64])
    parser.add_argument("--anchors", type=int, nargs="+", default=[32, 64, 128, 256, 512])
    parser.add_argument("--shards", type=int, default=10, help="shards of 10,000 tokens of the caches for K")
    parser.add_argument(
        "--hidden", type=int, default=64, help="hidden size of the made-up target, and the sketch's rank"
    )
    parser.add_argument("--vocab", type=int, default=49_152)
    parser.add_argument("--passes", type=int, default=5, help="readings measured, after one to warm up")
    parser.add_argument("--plot", help="also draw the figures into this PNG")
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.one:
        url, rank, world = args.one
        print(json.dumps(read_part(url, int(rank), int(world), args.passes)))
        return
    found: dict[str, list[tuple[int, Row]]] = {}
    with tempfile.TemporaryDirectory(prefix="specauf-scale-") as place:
        for name, size, row in settings(args, Path(place)):
            found.setdefault(name, []).append((size, row))
            print(f"{name} {size:,}: " + ", ".join(f"{key} {value:,.6g}" for key, value in row.items()), flush=True)
    fitted = exponents(found)
    for name, each in fitted.items():
        print(f"growth with {name}: " + ", ".join(f"{key} {value:.2f}" for key, value in each.items()))
    result = {"benchmark": "scale", "figures": found, "growth": fitted, "hidden": args.hidden, "vocab": args.vocab}
    if args.plot:
        from benchmarks.scale_plot import draw

        draw(found, args.plot)
    finish(result, args.json)


if __name__ == "__main__":
    main()
