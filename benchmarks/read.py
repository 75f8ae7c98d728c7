"""Shuffled reading: this cache beside one safetensors file a document and beside one flat np.memmap, same data.

    python -m benchmarks.read [--cache DIR] [--features sketch] [--documents 1500] [--tokens 160] [--rounds 5] ...

Documents come from a cache, or are made up with a language model's shape. All three layouts hold the same numbers
(features as the same codes and scales), are read whole in a shuffled order, in this process, with the page cache warm;
rounds of the three alternate. Each reading gives a training loop's arrays: tokens, mask, rows, top-k ids and log-probs
as int64 and float32, and what the drafter's `fc` reads in float32. Only the cache is compressed, and only it is checked
against digests. Ends with one JSON line.
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
from specauf.cache import FeatureCodec, Identity, open_cache
from specauf.cache.features import decode_bf16
from specauf.cache.location import Location
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


def rival_arrays(cache_dir: str) -> tuple[list[Arrays], FeatureCodec]:
    """Each document of a cache in plain arrays, features as stored codes."""
    cache = open_cache(cache_dir)
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
    return sum(x.size for x in out)


def read_cache(url: str, seed: int) -> int:
    """Shuffled as training reads."""
    size = 0
    for d in open_cache(url).documents(shuffle=True, seed=seed):
        assert d.topk_ids is not None
        assert d.topk_logprobs is not None
        out = [d.tokens, d.loss_mask, d.row_index, d.topk_ids, d.topk_logprobs, d.training_features]
        size += sum(x.size for x in out if x is not None)
    return size


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


def timed(work: Callable[[], int]) -> tuple[float, int]:
    """Seconds, and numbers read."""
    started = time.perf_counter()
    size = work()
    return time.perf_counter() - started, size


def rounds(readers: dict[str, Callable[[int], int]], count: int) -> Iterator[tuple[str, float, int]]:
    """Seconds of each reader in turn; the first round warms up and is not given."""
    with progress("read", float(count + 1), unit="rounds", initial=0.0) as advance:
        for number in range(count + 1):
            for name, read in readers.items():
                seconds, size = timed(lambda read=read, number=number: read(number))  # type: ignore[misc]
                if number:
                    yield name, seconds, size
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
        arrays, codec = rival_arrays(url)
        files = Path(place, "files")
        files.mkdir()
        for number, a in enumerate(arrays):
            save_file(a, files / f"{number}.safetensors")
        flat, count = Flat(Path(place, "flat"), arrays), len(arrays)
        readers = {
            "cache": lambda seed: read_cache(url, seed),
            "safetensors": lambda seed: read_files(files, count, codec, seed),
            "memmap": lambda seed: flat.read(count, codec, seed),
        }
        speed: dict[str, list[float]] = {name: [] for name in readers}
        sizes = set()
        for name, seconds, size in rounds(readers, args.rounds):
            speed[name].append(count / seconds)
            sizes.add(size)
        assert len(sizes) == 1, f"the layouts do not give the same numbers: {sizes}"
        shards = {f"{s.name}.zarr" for s in open_cache(url).manifest.shards}
        stored = {
            "cache": sum(b for n, b in Location(url).files().items() if n.split("/")[0] in shards),
            "safetensors": sum(p.stat().st_size for p in files.iterdir()),
            "memmap": sum(p.stat().st_size for p in Path(place, "flat").iterdir()),
        }
    report(speed, stored, count, codec.kind)


def report(speed: dict[str, list[float]], stored: dict[str, int], count: int, kind: str) -> None:
    """Print a table, then one JSON line; ratios are medians over rounds of neighbours in time."""
    ratios = {
        name: [a / b for a, b in zip(speed["cache"], values, strict=True)]
        for name, values in speed.items()
        if name != "cache"
    }
    print(f"{count} documents, features {kind}, {len(speed['cache'])} rounds; median (least to most)")
    for name, values in speed.items():
        print(
            f"  {name:<12} {statistics.median(values):>9,.0f} documents/s ({min(values):,.0f} to {max(values):,.0f}), "
            f"{stored[name] / 1e6:,.1f} MB"
        )
    for name, values in ratios.items():
        print(f"  cache / {name:<12} {statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})")
    figures = {
        "benchmark": "read", "features": kind, "documents": count, "bytes": stored,
        "documents_per_second": {n: statistics.median(v) for n, v in speed.items()},
        "ratio": {n: statistics.median(v) for n, v in ratios.items()},
        "ratio_range": {n: [min(v), max(v)] for n, v in ratios.items()},
    }  # fmt: skip
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
