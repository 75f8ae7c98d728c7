"""What a cache holds, as figures and as text."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from cache_builder.dates import DATE
from specauf.cache.logprobs import decode_head_mass
from specauf.cache.reader import Cache, open_cache
from specauf.cache.schema import Manifest, to_json
from specauf.cache.shard import Document
from specauf.errors import UserError
from specauf.progress import progress

TOPK = ("topk_ids", "id_table", "topk_logprobs", "head_mass")


@dataclass(frozen=True)
class Inspection:
    """A cache's figures, and some documents to look at.

    Attributes:
        cache: where it is.
        manifest: its table of contents.
        head_mass: mean, 10th percentile and minimum of the probability that the kept entries hold together.
        samples: decoded documents.
    """

    cache: str
    manifest: Manifest
    head_mass: dict[str, float]
    samples: list[str]

    def figures(self) -> dict[str, Any]:
        """For scripts."""
        return {"cache": self.cache, **figures(self.manifest), "head_mass": self.head_mass}

    def text(self) -> str:
        """For people."""
        identity, mass = self.manifest.identity, self.head_mass
        regeneration = identity.regeneration
        answers = "the corpus' own answers"
        if regeneration:
            answers = f"the target's {'greedy' if regeneration['greedy'] else 'sampled'} answers"
        lines = [
            summary(self.cache, self.manifest),
            f"  target     {_target(identity.target)}, {identity.num_target_layers} layers of {identity.hidden_size}, "
            f"vocabulary {identity.vocab_size:,}, {identity.target_dtype}",
            f"  corpus     {identity.corpus.get('name', '?')}, {answers}"
            + (f", prompts dated {identity.corpus[DATE]}" if DATE in identity.corpus else ""),
            f"  features   {identity.features}"
            + (f" of rank {identity.sketch_rank}" if identity.sketch_rank else "")
            + f", taps {', '.join(map(str, identity.taps))}, mask token {identity.mask_token_id}",
            f"  top-{identity.k}     retained mass {mass['mean']:.3f} on average, {mass['p10']:.3f} at the 10th "
            f"percentile, {mass['min']:.3f} at least; argmax is the data's token in "
            f"{self.manifest.counts.argmax_is_data:.1%} of rows",
            f"  dropped    {_drops(self.manifest)}",
            "",
            f"  {'field':<16} {'type':<9} {'rows':>12} {'bytes':>16} {'bytes/row':>10}",
        ]
        for name, field in sorted(self.manifest.fields.items(), key=lambda item: -item[1].bytes):
            each = field.bytes / max(1, field.rows)
            lines.append(f"  {name:<16} {field.dtype:<9} {field.rows:>12,} {field.bytes:>16,} {each:>10.2f}")
        return "\n".join([*lines, *(f"\n{sample}" for sample in self.samples)])


def figures(manifest: Manifest) -> dict[str, Any]:
    """What a manifest says in numbers."""
    import json

    counts = manifest.counts
    topk = sum(manifest.fields[name].bytes for name in TOPK if name in manifest.fields)
    return {
        "identity": json.loads(to_json(manifest.identity)),
        "documents": counts.documents,
        "held_out_documents": counts.held_out_documents,
        "tokens": counts.tokens,
        "supervised_tokens": counts.supervised_tokens,
        "shards": len(manifest.shards),
        "bytes": manifest.total_bytes,
        "bytes_per_token": manifest.total_bytes / max(1, counts.tokens),
        "fields": {
            name: {"bytes": f.bytes, "bytes_per_row": f.bytes / max(1, f.rows), "dtype": f.dtype, "rows": f.rows}
            for name, f in sorted(manifest.fields.items())
        },
        "topk_bytes_per_supervised_token": topk / max(1, counts.supervised_tokens),
        "head_mass": {"mean": counts.head_mass_mean},
        "argmax_is_data": counts.argmax_is_data,
        "drops": manifest.drops,
    }


def summary(where: str, manifest: Manifest) -> str:
    """A cache in one line."""
    counts = manifest.counts
    return (
        f"{where}: {counts.documents:,} documents ({counts.held_out_documents:,} held out), {counts.tokens:,} tokens, "
        f"{counts.supervised_tokens:,} supervised, {manifest.total_bytes / 1e6:,.1f} MB in {len(manifest.shards)} "
        f"shards ({manifest.total_bytes / max(1, counts.tokens):,.0f} bytes a token)"
    )


def build_summary(where: str, manifest: Manifest) -> str:
    """What a build says when it is done."""
    words = f"--data.cache={where}" + ("" if manifest.counts.held_out_documents else " --data.validate_on=train")
    return f"{summary(where, manifest)}\n  dropped {_drops(manifest)}\n  next: specauf fit, with {words}"


def inspect(where: str, samples: int) -> Inspection:
    """Read a cache's figures and decode some of its documents.

    Args:
        where: directory or fsspec URL.
        samples: documents to decode, spread over the cache.

    Raises:
        UserError: there is no cache, or it is damaged, or `samples` is negative.
    """
    if samples < 0:
        raise UserError(f"sample is {samples}, expected 0 or more: set --sample")
    cache = open_cache(where)
    masses = []
    with progress("inspect", float(cache.num_shards), unit="shards", initial=0.0) as advance:
        for number in range(cache.num_shards):
            masses.append(decode_head_mass(cache.shard(number, ("head_mass",)).arrays["head_mass"]))
            advance(1.0)
    mass = np.concatenate(masses)
    found = {"mean": float(mass.mean()), "p10": float(np.quantile(mass, 0.1)), "min": float(mass.min())}
    numbers = sorted({int(n) for n in np.linspace(0, len(cache) - 1, samples)})
    tokenizer = _tokenizer(cache) if numbers else None
    return Inspection(where, cache.manifest, found, [_decode(cache, tokenizer, n) for n in numbers])


def _tokenizer(cache: Cache) -> Any:
    from transformers import AutoTokenizer

    from specauf.targets import quiet_transformers

    with quiet_transformers():
        return AutoTokenizer.from_pretrained(cache.target.tokenizer_directory)


def _decode(cache: Cache, tokenizer: Any, number: int, rows: int = 12, entries: int = 4) -> str:
    """A document's text, and the most probable tokens of its first rows."""
    document: Document = cache.document(number, features=False)
    split = "held out" if document.held_out else "train"
    prompt, answer = (str(tokenizer.decode(document.tokens[m])) for m in (~document.loss_mask, document.loss_mask))
    assert document.topk_ids is not None
    assert document.topk_logprobs is not None
    lines = [f"document {number} ({split}, {len(document.tokens)} tokens)", _indent(prompt), "  ---", _indent(answer)]
    lines.append(f"  most probable next tokens of the first {rows} supervised rows, * marks the data's token:")
    for row in range(min(rows, len(document.row_index))):
        data = int(document.tokens[document.row_index[row] + 1])
        shown = [
            f"{'*' if int(token) == data else ''}{tokenizer.decode([int(token)])!r} {np.exp(logprob):.3f}"
            for token, logprob in zip(document.topk_ids[row][:entries], document.topk_logprobs[row], strict=False)
        ]
        lines.append(f"  {int(document.row_index[row]) + 1:>6}  " + "  ".join(shown))
    return "\n".join(lines)


def _indent(text: str) -> str:
    return "\n".join(f"  | {line}" for line in text.splitlines())


def _target(target: dict[str, str]) -> str:
    version = target.get("revision") or target.get("fingerprint") or "?"
    return f"{target.get('id', '?')}@{version[:12]}"


def _drops(manifest: Manifest) -> str:
    parts = [f"{n:,} {reason.replace('_', ' ')}" for reason, n in sorted(manifest.drops.items())]
    return ", ".join(parts) or "nothing"
