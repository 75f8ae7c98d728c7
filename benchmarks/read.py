"""Shuffled reading: this cache beside files of one document each, beside Arrow, and beside a flat np.memmap; same data.

    python -m benchmarks.read [--cache DIR] [--features sketch] [--documents 1500] [--tokens 160] [--cold] ...

Documents come from a cache, or are made up with a language model's shape. They are read whole in a shuffled order;
rounds of the layouts alternate. The page cache is warm, or with --cold the system is asked to forget a layout's files
before each reading, and every layout is opened anew. Each reading gives a training loop's arrays: tokens, mask, rows,
top-k ids and log-probs as int64 and float32, and what the drafter's `fc` reads in float32.

- cache: as training opens it. The only one that is compressed, and the only one whose bytes are checked.
- safetensors, torch.save: the same numbers in a file a document, features as the same small codes, which no other
  trainer has. arrow: the same in one table through `datasets`. memmap: the same in one flat file an array, the limit.
- bf16 files: a safetensors file a document with the taps in bf16, as other trainers store them. bf16 as is: the same,
  but features stay in bf16, so that their cast falls on the training step.

Processor time counts all threads; the cache unpacks large arrays in several, the others have one. Ends with one JSON
line.
"""

import argparse
import gc
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import finish, ratios, shown, spread
from benchmarks.layouts import Arrays, ArrowTable, Files, Flat, Layout, Ours, load_pickle, save_pickle
from cache_builder.document import BuiltDocument
from cache_builder.features import fit_features
from cache_builder.writer import StorageSpec, begin, write_manifest, write_shard, write_target
from specauf.cache import Cache, FeatureCodec, Identity
from specauf.progress import progress

TAPS = 5


class NoTokenizer:
    """The benchmark needs none, the format wants one."""

    def save_pretrained(self, save_directory: str) -> None:
        """Write a file that stands for it."""
        Path(save_directory, "tokenizer.json").write_text("{}")


def made_up(args: argparse.Namespace) -> list[BuiltDocument]:
    """Documents whose second half is supervised: skewed ids, a peaked top-k, features of slowly falling spectrum."""
    rng = np.random.default_rng(0)
    mixing = torch.from_numpy(rng.normal(0, 1, (args.hidden, TAPS * args.hidden))).float()
    spectrum = 1 / torch.arange(1, args.hidden + 1).sqrt()
    documents = []
    for number in range(args.documents):
        tokens = int(rng.integers(args.tokens // 2, 3 * args.tokens // 2))
        mask = np.arange(tokens) >= tokens // 2
        rows = np.flatnonzero(mask) - 1
        words = np.minimum(rng.zipf(1.2, (len(rows), args.k)), 2**40) * 7919 % args.vocab
        values = np.sort(rng.gumbel(0, 2, (len(rows), args.k)), 1)[:, ::-1]
        values = values - np.log(np.exp(values).sum(1, keepdims=True)) + np.log(0.97)
        x = (torch.from_numpy(rng.normal(0, 1, (tokens, args.hidden))).float() * spectrum) @ mixing
        documents.append(
            BuiltDocument(
                tokens=rng.integers(0, args.vocab, tokens),
                loss_mask=mask,
                row_index=rows,
                topk_ids=words.astype(np.int64),
                topk_logprobs=values.astype(np.float32),
                features=None if args.features == "none" else x,
                held_out=number % 20 == 0,
            )
        )
    return documents


def store(folder: Path, documents: list[BuiltDocument], args: argparse.Namespace) -> FeatureCodec:
    """The documents as a cache."""
    rank = args.hidden if args.features == "sketch" else 0
    who = Identity(
        {"id": "made-up", "fingerprint": "0"}, "", "", args.vocab, args.hidden, 30, tuple(range(TAPS)), args.k, None, 0,
        "float32", args.features, rank, {"name": "made-up"}, {}, "0",
    )  # fmt: skip
    sample = torch.cat([d.features for d in documents[:64] if d.features is not None] or [torch.zeros(1, 1)])
    codec = fit_features(sample, args.features, TAPS, rank)
    begin(str(folder), who)
    write_target(
        str(folder), who, config={}, embed_tokens=torch.zeros(args.vocab, 1), lm_head=None, tokenizer=NoTokenizer(),
        codec=codec,
    )  # fmt: skip
    shards = -(-len(documents) // args.shard)
    for number in range(shards):
        part = documents[number * args.shard : (number + 1) * args.shard]
        write_shard(str(folder), number, part, StorageSpec(who, codec))
    write_manifest(str(folder), who, shards)
    return codec


def rival_arrays(cache: Cache) -> tuple[list[Arrays], FeatureCodec]:
    """Each document of a cache in plain arrays, features as stored codes."""
    found = []
    for d in cache.documents():
        assert d.topk_ids is not None
        assert d.topk_logprobs is not None
        wide = np.uint16 if cache.manifest.identity.vocab_size <= 2**16 else np.uint32
        ids = np.maximum(d.topk_ids, 0).astype(wide)
        a = {"tokens": d.tokens.astype(wide), "mask": d.loss_mask, "rows": d.row_index.astype(np.uint16), "ids": ids}
        a |= {"logprobs": d.topk_logprobs}
        if d._codes is not None:
            a["codes"] = np.ascontiguousarray(d._codes)
        if d._scale is not None:
            a["scale"] = np.ascontiguousarray(d._scale)
        found.append(a)
    return found, cache.codec


def as_others_store(a: Arrays, codec: FeatureCodec) -> Arrays:
    """A document with its features in bf16."""
    values = torch.from_numpy(codec.decode(a["codes"], a.get("scale"))).to(torch.bfloat16)
    bits = values.view(torch.int16).numpy().view(np.uint16)
    return {n: v for n, v in a.items() if n not in ("codes", "scale")} | {"features": bits}


def forget(folder: Path) -> None:
    """Ask the system to drop a folder's files from its page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            os.fdatasync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)


def rounds(layouts: dict[str, Layout], count: int, *, cold: bool) -> Iterator[tuple[str, float, float, int]]:
    """Name, seconds, processor seconds and numbers read of each layout in turn, after a round that warms up."""
    with progress("read", float(count + 1), unit="rounds", initial=0.0) as advance:
        for number in range(count + 1):
            for name, layout in layouts.items():
                if cold:
                    layout.close()
                    gc.collect()  # what is mapped is not forgotten
                    forget(layout.folder)
                started, busy = time.perf_counter(), time.process_time()
                if cold:
                    layout.open()
                size = layout.read(number)
                if number:
                    yield name, time.perf_counter() - started, time.process_time() - busy, size
            advance(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", help="read the documents of this cache instead of made-up ones")
    parser.add_argument("--features", default="sketch", choices=("none", "bf16", "int8", "sketch"))
    parser.add_argument("--cold", action="store_true", help="let the system forget the files before each reading")
    defaults = {"documents": 1500, "tokens": 160, "hidden": 576, "vocab": 49_152, "k": 32, "shard": 192, "rounds": 5}
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="specauf-read-") as place:
        root = Path(place)
        if args.cache is None:
            store(root / "cache", made_up(args), args)
        ours = Ours(args.cache or str(root / "cache"))
        arrays, codec = rival_arrays(ours.cache)
        count, bytes_ours = len(arrays), ours.cache.manifest.total_bytes
        layouts: dict[str, Layout] = {"cache": ours, "safetensors": Files(root / "safetensors", arrays, codec)}
        if codec.kind in ("int8", "sketch"):
            wide = [as_others_store(a, codec) for a in arrays]
            layouts["bf16 files"] = Files(root / "bf16 files", wide, codec)
            wide = [{"bits" if name == "features" else name: v for name, v in a.items()} for a in wide]
            layouts["bf16 as is"] = Files(root / "bf16 as is", wide, codec)
            del wide
        layouts["torch.save"] = Files(root / "torch.save", arrays, codec, save_pickle, load_pickle)
        layouts["arrow"] = ArrowTable(root / "arrow", arrays, codec)
        layouts["memmap"] = Flat(root / "memmap", arrays, codec)
        del arrays
        measured: dict[str, list[tuple[float, float]]] = {name: [] for name in layouts}
        sizes: dict[str, int] = {}
        for name, seconds, busy, size in rounds(layouts, args.rounds, cold=args.cold):
            measured[name].append((seconds, busy))
            sizes[name] = size
        same = {size for name, size in sizes.items() if not name.startswith("bf16")}
        assert len(same) == 1, f"the layouts do not give the same numbers: {sizes}"
        stored = {n: sum(p.stat().st_size for p in (root / n).rglob("*")) for n in layouts if n != "cache"}
        stored["cache"] = bytes_ours
    kind = f"{codec.kind}, {'cold' if args.cold else 'warm'} page cache"
    report(measured, stored, count, ours.cache.manifest.counts.tokens, kind, args.json)


def report(
    measured: dict[str, list[tuple[float, float]]],
    stored: dict[str, int],
    count: int,
    tokens: int,
    kind: str,
    path: str | None,
) -> None:
    """Print a table, then one JSON line; ratios are of neighbours in time."""
    what = f"{count} documents, {tokens} tokens, features {kind}"
    print(f"{what}, {len(measured['cache'])} rounds; median (least to most)")
    speed = {name: spread([count / seconds for seconds, _ in values]) for name, values in measured.items()}
    busy = {name: spread([1e6 * used / tokens for _, used in values]) for name, values in measured.items()}
    for name, values in speed.items():
        print(
            f"  {name:<12} {shown(values, 0)} documents/s, {busy[name]['median']:.2f} processor seconds "
            f"a million tokens, {stored[name] / tokens:,.0f} bytes a token"
        )
    ours_seconds, ours_busy = zip(*measured["cache"], strict=True)
    ratio, processor_ratio = {}, {}
    for name in (n for n in measured if n != "cache"):
        seconds, used = zip(*measured[name], strict=True)
        ratio[name], processor_ratio[name] = ratios(seconds, ours_seconds), ratios(used, ours_busy)
        print(f"  cache / {name:<12} {shown(ratio[name])}; for the same processor time {shown(processor_ratio[name])}")
    figures = {
        "benchmark": "read", "features": kind, "documents": count, "tokens": tokens, "bytes": stored,
        "documents_per_second": speed, "processor_s_per_million_tokens": busy,
        "ratio": ratio, "processor_ratio": processor_ratio,
    }  # fmt: skip
    finish(figures, path)


if __name__ == "__main__":
    main()
