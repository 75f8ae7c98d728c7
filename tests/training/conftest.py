"""A cache of a tiny target's own greedy answers, written by the real writer."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cache_builder.document import BuiltDocument
from cache_builder.features import fit_features
from cache_builder.sparse import topk_logprobs
from cache_builder.writer import StorageSpec, begin, write_manifest, write_shard, write_target
from specauf.targets import default_taps
from tests.builder.conftest import HIDDEN, LAYERS, make_target, make_tokenizer
from tests.cache.making import identity

PROMPT, ANSWER, K = 6, 20, 4


@torch.no_grad()
def answered(target, count: int, seed: int) -> list[BuiltDocument]:
    """Random prompts, answered greedily; every fourth document is held out."""
    rng = np.random.default_rng(seed)
    documents = []
    for number in range(count):
        prompt = torch.from_numpy(rng.integers(0, 256, (1, PROMPT)))
        tokens = target.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=ANSWER, do_sample=False, pad_token_id=0
        )
        hidden = target.model(tokens, output_hidden_states=True)
        features = torch.cat([hidden.hidden_states[tap + 1] for tap in default_taps(LAYERS)], -1)[0]
        loss_mask = np.arange(tokens.shape[1]) >= PROMPT
        rows = np.flatnonzero(loss_mask[1:])
        ids, logprobs = topk_logprobs(hidden.last_hidden_state[0, rows], target.lm_head.weight, K)
        documents.append(
            BuiltDocument(tokens[0].numpy(), loss_mask, rows, ids.numpy(), logprobs.numpy(), features, number % 4 == 3)
        )
    return documents


def write_tiny_cache(folder: Path, *, documents: int = 24, per_shard: int = 8, **changes: object) -> Path:
    """A finished cache of the tiny target."""
    target = make_target()
    who = replace(
        identity(),
        vocab_size=target.config.vocab_size,
        hidden_size=HIDDEN,
        num_target_layers=LAYERS,
        taps=default_taps(LAYERS),
        k=K,
        mask_token_id=258,
        **changes,
    )
    built = answered(target, documents, seed=0)
    sample = torch.cat([d.features for d in built])
    codec = fit_features(sample, who.features, len(who.taps), who.sketch_rank)
    begin(str(folder), who)
    write_target(
        str(folder),
        who,
        config=target.config.to_dict(),
        embed_tokens=target.get_input_embeddings().weight,
        lm_head=target.lm_head.weight,
        tokenizer=make_tokenizer(),
        codec=codec,
    )
    for number, start in enumerate(range(0, documents, per_shard)):
        write_shard(str(folder), number, built[start : start + per_shard], StorageSpec(who, codec), {})
    write_manifest(str(folder), who, -(-documents // per_shard))
    return folder


@pytest.fixture(scope="session")
def tiny_cache(tmp_path_factory) -> Path:
    """A finished cache of 24 documents in 3 shards."""
    return write_tiny_cache(tmp_path_factory.mktemp("tiny") / "cache")
