"""What a cache costs on disk and what storing changes: the table of docs/cache-format.md.

    python -m benchmarks.cache_size CACHE [--target smollm2-135m] [--documents 96]

The target runs again over some of the cache's documents, so that stored numbers can be compared with exact ones and
every kind of features can be stored from the same values. Then the same tokens are counted in the layouts of other
projects, and at the dimensions of larger targets: these are calculated, not measured. Ends with one JSON line.
"""

import argparse
from typing import Any

import numpy as np
import torch

from benchmarks.common import finish
from cache_builder.encode import encode_group
from cache_builder.features import encode_features, fit_features, reconstruction_error
from cache_builder.inspect import TOPK
from cache_builder.target import Target
from cache_builder.teacher import read_all
from specauf.cache import Cache, FeatureCodec, logprobs, open_cache
from specauf.progress import progress
from specauf.targets import load_target, resolve_target

# Vocabulary, hidden size; five taps each.
DIMENSIONS = {"SmolLM2-135M": (49_152, 576), "Qwen3-4B": (151_936, 2560), "Llama-3-8B": (128_256, 4096)}
TAPS = 5


def rivals(hidden: int) -> dict[str, int]:
    """Bytes a token of other projects' layouts, from their source: bf16 values, no compression.

    DeepSpec v2: int32 id, two byte masks, taps and last hidden state. SpecForge (DFlash): int64 id and mask, taps.
    speculators: int64 id, taps and last hidden state; ids and mask again in Arrow, not counted.
    """
    taps = 2 * hidden * TAPS
    return {"DeepSpec": taps + 2 * hidden + 6, "SpecForge": taps + 16, "speculators": taps + 2 * hidden + 8}


def topk_costs(exact: np.ndarray) -> dict[str, float]:
    """What quantising log-probabilities changes; `exact` is [rows, k], nats."""
    values = exact.astype(np.float64)
    mass = logprobs.decode_head_mass(logprobs.encode_head_mass(np.exp(values).sum(1)))
    again = logprobs.decode_logprobs(logprobs.encode_logprobs(values), mass).astype(np.float64)
    p = np.exp(values)
    head_p, head_q = (np.exp(v) / np.exp(v).sum(1, keepdims=True) for v in (values, again))
    return {
        "rows": len(values),
        "kl_kept": float((p * (values - again)).sum(1).mean()),
        "kl_kept_normalised": float((head_p * np.log(head_p / head_q)).sum(1).mean()),
        "largest_error": float(np.abs(values - again).max()),
        "top1_changed": int((again.argmax(1) != values.argmax(1)).sum()),
        "order_broken": int((np.diff(again, axis=1) > 0).sum()),
    }


def feature_costs(cache: Cache, fit: torch.Tensor, x: torch.Tensor) -> dict[str, dict[str, Any]]:
    """Bytes a token and relative error by tap of every kind; bf16 has no error beyond the target's own rounding."""
    taps, rank = len(cache.manifest.identity.taps), cache.manifest.identity.hidden_size
    found: dict[str, dict[str, Any]] = {}
    for kind in ("bf16", "int8", "sketch"):
        codec: FeatureCodec = (
            cache.codec if cache.codec.kind == kind else fit_features(fit.float(), kind, taps, rank)  # type: ignore[arg-type]
        )
        arrays = encode_features(x, codec)
        plain, compressed = (
            sum(map(len, encode_group(arrays, {}, compress_features=yes).values())) / len(x) for yes in (False, True)
        )
        found[kind] = {
            "bytes_per_token": plain, "compressed_bytes_per_token": compressed,
            "error_by_tap": reconstruction_error(x, codec),
        }  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache")
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--documents", type=int, default=96)
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args()
    cache = open_cache(args.cache)
    identity, manifest = cache.manifest.identity, cache.manifest
    config = resolve_target(args.target)
    target = Target(*load_target(config), config, k=identity.k)
    identity.require(args.cache, vocab_size=target.vocab_size, taps=tuple(target.taps))
    numbers = np.linspace(0, len(cache) - 1, args.documents).astype(int)
    documents = [cache.document(int(n), topk=False, features=False) for n in numbers]
    with progress("run the target", float(len(documents)), unit="documents", initial=0.0) as advance:
        given = [(d.tokens, d.loss_mask) for d in documents]
        read = read_all(target, given, batch_tokens=4096, advance=lambda tokens, done: advance(int(done)))
    features = [f for _, _, f in read if f is not None]
    topk = topk_costs(np.concatenate([values for _, values, _ in read]))
    stored = feature_costs(cache, torch.cat(features[::2]), torch.cat(features[1::2]))
    supervised = manifest.counts.supervised_tokens
    payload = {name: manifest.fields[name].bytes / supervised for name in TOPK}
    report(args.cache, payload, topk, stored, supervised / manifest.counts.tokens, args.json)


def report(
    where: str,
    payload: dict[str, float],
    topk: dict[str, float],
    stored: dict[str, dict[str, Any]],
    share: float,
    path: str | None,
) -> None:
    """Print the tables, then one JSON line."""
    total = sum(payload.values())
    parts = ", ".join(f"{name} {each:.1f}" for name, each in payload.items())
    print(f"{where}\n\ntop-k: {total:.1f} bytes a supervised token ({parts})")
    print(
        f"  over {topk['rows']:,} rows: KL(exact || decoded) of the kept entries {topk['kl_kept']:.1e} nats "
        f"({topk['kl_kept_normalised']:.1e} when both are normalised), largest error {topk['largest_error']:.3f} nats, "
        f"top-1 changed in {topk['top1_changed']} rows\n"
    )
    raw = 2 * DIMENSIONS["SmolLM2-135M"][1] * TAPS
    print("| features | bytes a token | of bf16 | compressed | of bf16 | relative squared error by tap |")
    print("|---|---|---|---|---|---|")
    for kind, cost in stored.items():
        errors = " ".join(f"{e:.1e}" for e in cost["error_by_tap"])
        sizes_of = (cost["bytes_per_token"], cost["compressed_bytes_per_token"])
        cells = " | ".join(f"{each:,.0f} | {each / raw:.3f}" for each in sizes_of)
        print(f"| {kind} | {cells} | {errors} |")
    print(f"\nBytes a token, {share:.0%} of them supervised; calculated for the larger targets:\n")
    print("| target | ours, sketch | ours, int8 | DeepSpec | SpecForge | speculators |\n|---|---|---|---|---|---|")
    sizes: dict[str, dict[str, float]] = {}
    vocab, _ = DIMENSIONS["SmolLM2-135M"]
    for name, (wide, hidden) in DIMENSIONS.items():
        # A larger vocabulary makes each of k ids longer by its logarithm.
        head = (total + 32 * np.log2(wide / vocab) / 8) * share + 5
        ours = {"sketch": hidden + 4 + head, "int8": TAPS * (hidden + 4) + head}
        sizes[name] = ours | rivals(hidden)
        print(f"| {name} | " + " | ".join(f"{b:,.0f}" for b in sizes[name].values()) + " |")
    figures = {"benchmark": "cache_size", "topk_bytes": payload, "topk": topk, "features": stored, "sizes": sizes}
    finish(figures, path)


if __name__ == "__main__":
    main()
