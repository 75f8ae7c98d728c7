"""Replay of a cache that SmolLM2 answered greedily, beside real decoding of the same prompts.

SPECAUF_DRAFTER names a trained drafter and SPECAUF_CACHE the cache it was trained on, by default the demo's;
SPECAUF_DOCUMENTS says how many held-out documents are decoded (8).
"""

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from specauf.cache import open_cache
from specauf.checkpoint import load_drafter
from specauf.decoding import replay, speculative_generate
from specauf.drafters import TargetVocabulary
from specauf.linear import use_onednn
from specauf.targets import load_target, resolve_target
from tests.drafters.tiny import TinyDocument, features_of

pytestmark = pytest.mark.slow
TRAINED = Path(os.environ.get("SPECAUF_DRAFTER", "runs/demo/auf"))
CACHE = Path(os.environ.get("SPECAUF_CACHE", "caches/demo"))
DOCUMENTS = int(os.environ.get("SPECAUF_DOCUMENTS", "8"))


def tau(accepted: list[list[int]]) -> float:
    return 1 + sum(map(sum, accepted)) / sum(map(len, accepted))


def test_replay_of_held_out_documents_is_real_decoding():
    for path in (TRAINED, CACHE):
        if not path.exists():
            pytest.skip(f"{path} is missing: make demo makes it, or set SPECAUF_DRAFTER and SPECAUF_CACHE")
    target, _ = load_target(resolve_target("smollm2-135m"))
    drafter, vocabulary = load_drafter(TRAINED).eval().requires_grad_(False), TargetVocabulary.from_target(target)
    use_onednn(drafter)
    stored = list(itertools.islice(open_cache(str(CACHE)).documents(split="held_out", topk=False), DOCUMENTS))
    raw, real = [], []
    for document in stored:
        ids, answer = document.tokens[~document.loss_mask], document.tokens[document.loss_mask]
        assert document.loss_mask[len(ids) :].all()
        found = speculative_generate(
            target, drafter, torch.from_numpy(ids), max_new_tokens=len(answer), stop_token_ids=[], vocabulary=vocabulary
        )
        assert found.tokens == answer.tolist(), f"document {document.index} is no greedy answer of this target"
        features = features_of(target, torch.from_numpy(document.tokens), drafter.config.taps).numpy()
        raw.append(TinyDocument(document.index, document.tokens, document.loss_mask, features))
        real.append(found.accepted)
    exact = [r.accepted.tolist() for r in replay(drafter, vocabulary, raw)]
    rounded = [r.accepted.tolist() for r in replay(drafter, vocabulary, stored)]
    differ = sum(a != b for a, b in zip(rounded, real, strict=True))
    print(
        f"{len(real)} documents, {sum(map(len, real))} cycles: tau {tau(real):.4f} from real decoding, "
        f"{tau(exact):.4f} from replay over the features themselves, {tau(rounded):.4f} over what the cache keeps "
        f"({differ} documents go through other cycles)"
    )
    assert exact == real
    assert np.mean([a for d in real for a in d]) > 0
    # What the cache rounds off changes a draft now and then.
    assert tau(rounded) == pytest.approx(tau(real), rel=0.05)
