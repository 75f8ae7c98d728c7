"""Small made-up documents and caches for the tests."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from cache_builder.document import BuiltDocument
from cache_builder.features import fit_features
from cache_builder.writer import StorageSpec, begin, write_manifest, write_shard, write_target
from specauf.cache import FeatureCodec, Identity
from specauf.cache.location import Location
from specauf.cache.schema import Manifest

VOCABULARY, HIDDEN, TAPS = 300, 8, (0, 2)


class FakeTokenizer:
    """Saves two files, as a tokenizer does."""

    def save_pretrained(self, save_directory: str) -> None:
        Path(save_directory, "tokenizer.json").write_text('{"model": "fake"}')
        Path(save_directory, "chat_template.jinja").write_text("{{ messages }}")


def identity(**changes: object) -> Identity:
    """An identity of a tiny target."""
    base = Identity(
        target={"id": "tiny/target", "fingerprint": "00ff"},
        tokenizer_hash="aa",
        chat_template_hash="bb",
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_target_layers=4,
        taps=TAPS,
        k=4,
        top_p=None,
        mask_token_id=299,
        target_dtype="float32",
        features="bf16",
        sketch_rank=0,
        corpus={"name": "made-up"},
        regeneration={"greedy": True},
        code_version="0",
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def document(rng: np.random.Generator, tokens: int, who: Identity, *, held_out: bool = False) -> BuiltDocument:
    """A document whose second half is supervised."""
    loss_mask = np.arange(tokens) >= tokens // 2
    rows = np.flatnonzero(loss_mask[1:])
    logits = torch.from_numpy(rng.normal(0, 3, (len(rows), who.vocab_size))).float()
    best = torch.log_softmax(logits, -1).topk(who.k)
    features = torch.from_numpy(rng.normal(0, 2, (tokens, who.feature_width))).float()
    return BuiltDocument(
        tokens=rng.integers(0, who.vocab_size, tokens),
        loss_mask=loss_mask,
        row_index=rows,
        topk_ids=best.indices.numpy(),
        topk_logprobs=best.values.numpy(),
        features=None if who.features == "none" else features,
        held_out=held_out,
    )


def write_fake_target(folder: Path | str, who: Identity, codec: FeatureCodec) -> None:
    """A target's files: a random embedding and two files of a tokenizer."""
    embedding = torch.from_numpy(np.random.default_rng(1).normal(0, 1, (who.vocab_size, who.hidden_size))).float()
    write_target(
        str(folder),
        who,
        config={"model_type": "llama"},
        embed_tokens=embedding,
        lm_head=None,
        tokenizer=FakeTokenizer(),
        codec=codec,
    )


def build(
    folder: Path | str, who: Identity, lengths: list[list[int]], seed: int = 0, *, compress_features: bool = False
) -> list[BuiltDocument]:
    """Write a whole cache, one shard for each list of document lengths; every fifth document is held out."""
    rng = np.random.default_rng(seed)
    shards = [[document(rng, n, who, held_out=i % 5 == 4) for i, n in enumerate(shard)] for shard in lengths]
    sample = torch.from_numpy(rng.normal(0, 2, (64, who.feature_width))).float()
    codec = fit_features(sample, who.features, len(who.taps), who.sketch_rank)
    begin(str(folder), who)
    Location(str(folder)).write("build.json", b'{"command": "build"}')
    write_fake_target(folder, who, codec)
    for number, documents in enumerate(shards):
        write_shard(str(folder), number, documents, StorageSpec(who, codec, compress_features), {"empty": 1})
    write_manifest(str(folder), who, len(shards), {"too short": 2})
    return [d for shard in shards for d in shard]


def expect_fields_of_the_arrays(folder: Path, whole: Manifest) -> None:
    """Of every array, by its own metadata and the sizes of its objects."""
    found: dict[str, list[tuple[str, int, int, int]]] = {}
    for path in folder.glob("shard-*.zarr/*/zarr.json"):
        meta = json.loads(path.read_text())
        stored = sum(p.stat().st_size for p in path.parent.rglob("*") if p.is_file())
        shape = meta["shape"]
        found.setdefault(path.parent.name, []).append((meta["data_type"], int(np.prod(shape[1:])), shape[0], stored))
    assert found.keys() == whole.fields.keys()
    for name, field in whole.fields.items():
        types, widths, rows, sizes = zip(*found[name], strict=True)
        assert field.dtype == max(types, key=lambda t: np.dtype(t).itemsize)
        assert {field.width} == set(widths)
        assert (field.rows, field.bytes) == (sum(rows), sum(sizes))
