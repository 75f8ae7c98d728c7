"""Shuffled reading: this cache beside one safetensors file a document and beside one flat np.memmap, same data.

    python -m benchmarks.read [--cache DIR] [--features sketch] [--documents 1500] [--tokens 160] [--rounds 5] ...

Documents come from a cache, or are made up with a language model's shape. They are read whole in a shuffled order with
the page cache warm; rounds of the layouts alternate. Each reading gives a training loop's arrays: tokens, mask, rows,
top-k ids and log-probs as int64 and float32, and what the drafter's `fc` reads in float32.

- cache: as training opens it. The only one that is compressed, and the only one whose bytes are checked.
- safetensors, memmap: the same numbers, features as the same small codes, which no other trainer has.
- bf16 files: a safetensors file a document with the taps in bf16, as other trainers store them; given out as they are.

Processor time counts all threads; the cache decodes the next shards in threads of its own while one is read, the others
do not. Ends with one JSON line.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from cache_builder.document import BuiltDocument
from cache_builder.features import fit_features
from cache_builder.writer import StorageSpec, begin, write_manifest, write_shard, write_target
from specauf.cache import Cache, FeatureCodec, Identity, open_cache
from specauf.cache.features import decode_bf16
from specauf.progress import progress

Arrays = dict[str, np.ndarray]
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
    for number in range(-(-len(documents) // args.shard)):
        part = documents[number * args.shard : (number + 1) * args.shard]
        write_shard(str(folder), number, part, StorageSpec(who, codec))
    write_manifest(str(folder), who)
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


def finished(a: Arrays, codec: FeatureCodec) -> int:
    """The training loop's arrays of a rival's document; returns how many numbers they are."""
    out = [a["tokens"].astype(np.int64), a["mask"], a["rows"].astype(np.int64), a["ids"].astype(np.int64)]
    out.append(a["logprobs"].astype(np.float32))
    if "codes" in a:
        codes, scale = a["codes"], a.get("scale")
        if codec.kind == "sketch":
            assert scale is not None
            out.append(codes * scale.astype(np.float32)[:, None])
        else:
            out.append(decode_bf16(codes) if codec.kind == "bf16" else codec.decode(codes, scale))
    if "features" in a:
        out.append(a["features"])
    return sum(x.size for x in out)


def read_cache(cache: Cache, epoch: int) -> int:
    """Shuffled as training reads."""
    size = 0
    for d in cache.documents(shuffle=True, epoch=epoch):
        assert d.topk_ids is not None
        assert d.topk_logprobs is not None
        out = [d.tokens, d.loss_mask, d.row_index, d.topk_ids, d.topk_logprobs, d.training_features]
        size += sum(x.size for x in out if x is not None)
    return size


def as_others_store(a: Arrays, codec: FeatureCodec) -> Arrays:
    """A document with its features in bf16."""
    values = torch.from_numpy(codec.decode(a["codes"], a.get("scale"))).to(torch.bfloat16)
    bits = values.view(torch.int16).numpy().view(np.uint16)
    return {n: v for n, v in a.items() if n not in ("codes", "scale")} | {"features": bits}


def write_files(folder: Path, documents: list[Arrays]) -> None:
    """One safetensors file a document."""
    folder.mkdir()
    for number, a in enumerate(documents):
        save_file(a, folder / f"{number}.safetensors")


def read_files(folder: Path, count: int, codec: FeatureCodec, seed: int) -> int:
    """One safetensors file a document."""
    order = np.random.default_rng(seed).permutation(count)
    return sum(finished(load_file(folder / f"{n}.safetensors"), codec) for n in order)


class Flat:
    """All documents end to end, one flat file for each array, mapped; offsets in memory.

    Args:
        folder: where the files go.
        documents: their arrays.
    """

    def __init__(self, folder: Path, documents: list[Arrays]) -> None:
        folder.mkdir()
        self.arrays, self.offsets = {}, {}
        for name in documents[0]:
            whole = np.concatenate([d[name] for d in documents])
            whole.tofile(folder / name)
            self.arrays[name] = np.memmap(folder / name, whole.dtype, "r", shape=whole.shape)
            self.offsets[name] = np.concatenate([[0], np.cumsum([len(d[name]) for d in documents])])

    def read(self, count: int, codec: FeatureCodec, seed: int) -> int:
        """Shuffled."""
        return sum(
            finished({k: v[self.offsets[k][n] : self.offsets[k][n + 1]] for k, v in self.arrays.items()}, codec)
            for n in np.random.default_rng(seed).permutation(count)
        )


def rounds(readers: dict[str, Callable[[int], int]], count: int) -> Iterator[tuple[str, float, float, int]]:
    """Name, seconds, processor seconds and numbers read of each reader in turn, after a round that warms up."""
    with progress("read", float(count + 1), unit="rounds", initial=0.0) as advance:
        for number in range(count + 1):
            for name, read in readers.items():
                started, busy = time.perf_counter(), time.process_time()
                size = read(number)
                if number:
                    yield name, time.perf_counter() - started, time.process_time() - busy, size
            advance(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", help="read the documents of this cache instead of made-up ones")
    parser.add_argument("--features", default="sketch", choices=("none", "bf16", "int8", "sketch"))
    defaults = {"documents": 1500, "tokens": 160, "hidden": 576, "vocab": 49_152, "k": 32, "shard": 192, "rounds": 5}
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="specauf-read-") as place:
        url = args.cache
        if url is None:
            url = str(Path(place, "cache"))
            store(Path(url), made_up(args), args)
        cache = open_cache(url)
        arrays, codec = rival_arrays(cache)
        count = len(arrays)
        readers: dict[str, Callable[[int], int]] = {"cache": lambda epoch: read_cache(cache, epoch)}
        layouts = {"safetensors": arrays}
        if codec.kind in ("int8", "sketch"):
            layouts["bf16 files"] = [as_others_store(a, codec) for a in arrays]
        for name, documents in layouts.items():
            folder = Path(place, name)
            write_files(folder, documents)
            readers[name] = lambda seed, folder=folder: read_files(folder, count, codec, seed)  # type: ignore[misc]
        flat = Flat(Path(place, "memmap"), arrays)
        readers["memmap"] = lambda seed: flat.read(count, codec, seed)
        del arrays, layouts
        measured: dict[str, list[tuple[float, float]]] = {name: [] for name in readers}
        sizes: dict[str, int] = {}
        for name, seconds, busy, size in rounds(readers, args.rounds):
            measured[name].append((seconds, busy))
            sizes[name] = size
        same = {sizes[name] for name in ("cache", "safetensors", "memmap")}
        assert len(same) == 1, f"the layouts do not give the same numbers: {sizes}"
        stored = {n: sum(p.stat().st_size for p in Path(place, n).iterdir()) for n in readers if n != "cache"}
        stored["cache"] = cache.manifest.total_bytes
    report(measured, stored, count, codec.kind)


def report(measured: dict[str, list[tuple[float, float]]], stored: dict[str, int], count: int, kind: str) -> None:
    """Print a table, then one JSON line; ratios are medians over rounds of neighbours in time."""
    print(f"{count} documents, features {kind}, {len(measured['cache'])} rounds; median (least to most)")
    speed = {name: [count / seconds for seconds, _ in values] for name, values in measured.items()}
    busy = {name: [1e6 * busy / count for _, busy in values] for name, values in measured.items()}
    for name, values in speed.items():
        print(
            f"  {name:<12} {statistics.median(values):>9,.0f} documents/s ({min(values):,.0f} to {max(values):,.0f}), "
            f"{statistics.median(busy[name]):,.0f} processor-us each, {stored[name] / 1e6:,.1f} MB"
        )
    ratios: dict[str, dict[str, list[float]]] = {}
    for name in (n for n in measured if n != "cache"):
        pairs = list(zip(measured["cache"], measured[name], strict=True))
        ratios[name] = {
            "speed": [theirs[0] / ours[0] for ours, theirs in pairs],
            "processor": [theirs[1] / ours[1] for ours, theirs in pairs],
        }
        wall, cpu = (f"{statistics.median(r):.2f} ({min(r):.2f} to {max(r):.2f})" for r in ratios[name].values())
        print(f"  cache / {name:<12} {wall}; for the same processor time {cpu}")
    figures = {
        "benchmark": "read", "features": kind, "documents": count, "bytes": stored,
        "documents_per_second": {n: statistics.median(v) for n, v in speed.items()},
        "processor_us_per_document": {n: statistics.median(v) for n, v in busy.items()},
        "ratio": {n: statistics.median(r["speed"]) for n, r in ratios.items()},
        "ratio_range": {n: [min(r["speed"]), max(r["speed"])] for n, r in ratios.items()},
        "processor_ratio": {n: statistics.median(r["processor"]) for n, r in ratios.items()},
    }  # fmt: skip
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
