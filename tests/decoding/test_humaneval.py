"""SmolLM2 on HumanEval: token for token what `generate(do_sample=False)` gives, whatever the drafter.

SPECAUF_PROMPTS and SPECAUF_NEW_TOKENS make the run shorter (all 164 prompts and 128 tokens take hours on 2 cores),
SPECAUF_BATCH says how many prompts are decoded together (8), SPECAUF_DRAFTER names a trained drafter, by default the
demo's. The plain answers are made once, for all drafters.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from specauf.checkpoint import load_drafter
from specauf.decoding import DecodeResult, replay, speculative_generate, speculative_generate_batch
from specauf.drafters import DFlashDrafter, Drafter, DrafterConfig, TargetVocabulary
from specauf.evaluation.benchmarks import load_benchmark
from specauf.evaluation.divergence import divergence
from specauf.evaluation.run import encode
from specauf.linear import use_onednn
from specauf.targets import load_target, mask_token_id, resolve_target
from tests.decoding.scripted import ALTERNATING, ALWAYS_RIGHT, ALWAYS_WRONG, ScriptedDrafter
from tests.drafters.tiny import TinyDocument, features_of

pytestmark = pytest.mark.slow
PROMPTS, NEW = int(os.environ.get("SPECAUF_PROMPTS", "164")), int(os.environ.get("SPECAUF_NEW_TOKENS", "128"))
BATCH = int(os.environ.get("SPECAUF_BATCH", "8"))
TRAINED = Path(os.environ.get("SPECAUF_DRAFTER", "runs/demo/auf"))
BLOCK = 8


class Humaneval:
    """The target, the prompts and their plain answers."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        about = resolve_target("smollm2-135m")
        self.target, tokenizer = load_target(about)
        self.target.to(dtype)
        self.vocabulary = TargetVocabulary.from_target(self.target)
        mask = mask_token_id(about, tokenizer, self.target.config.vocab_size)
        self.config = DrafterConfig.from_target(
            self.target.config.to_dict(), taps=about.taps, mask_token_id=mask, block_size=BLOCK
        )
        prompts = load_benchmark("humaneval", PROMPTS)
        self.names = [p.task_id for p in prompts]
        self.prompts = [encode(tokenizer, p.text)[0] for p in prompts]
        self.answers = [self._plain(ids[None]) for ids in self.prompts]

    def _plain(self, ids: torch.Tensor) -> list[int]:
        out = self.target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
        return out[0, ids.shape[1] :].tolist()

    def scripted(self, right: Any) -> ScriptedDrafter:
        """A drafter that knows the answers, and says them where `right` lets it."""
        texts = [ids.tolist() + answer for ids, answer in zip(self.prompts, self.answers, strict=True)]
        return ScriptedDrafter(self.config, texts, right)

    def decode(self, drafter: Drafter) -> list[DecodeResult]:
        """Every prompt, some at a time."""
        results: list[DecodeResult] = []
        for i in range(0, len(self.prompts), BATCH):
            some = self.prompts[i : i + BATCH]
            results += speculative_generate_batch(
                self.target, drafter, some, max_new_tokens=NEW, vocabulary=self.vocabulary
            )
        return results


@pytest.fixture(scope="module")
def humaneval() -> Humaneval:
    return Humaneval()


def check_lossless(humaneval: Humaneval, drafter: Drafter) -> set[int]:
    """Accepted lengths that occur, in cycles which are not their answer's last."""
    results = humaneval.decode(drafter)
    differing = [n for n, a, r in zip(humaneval.names, humaneval.answers, results, strict=True) if r.tokens != a]
    assert not differing, f"{len(differing)} of {PROMPTS} answers differ: {differing}"
    accepted = [a for r in results for a in r.accepted[:-1]]
    print(f"{len(results)} of {PROMPTS} prompts lossless, {len(accepted)} cycles, A + 1 = {1 + np.mean(accepted):.3f}")
    return set(accepted)


@pytest.mark.parametrize(
    ("right", "accepted"),
    [(ALWAYS_RIGHT, BLOCK - 1), (ALWAYS_WRONG, 0), (ALTERNATING, 1)],
    ids=["right", "wrong", "alternating"],
)
def test_adversarial_drafters_are_lossless_on_every_prompt(humaneval, right, accepted):
    assert check_lossless(humaneval, humaneval.scripted(right)) == {accepted}


def test_an_untrained_drafter_is_lossless_on_every_prompt(humaneval):
    torch.manual_seed(0)
    drafter = DFlashDrafter(humaneval.config).eval().requires_grad_(False)
    use_onednn(drafter)
    assert 0 in check_lossless(humaneval, drafter)


@pytest.fixture(scope="module")
def trained() -> Drafter:
    if not TRAINED.exists():
        pytest.skip(f"no trained drafter at {TRAINED}: make one with make demo, or name one in SPECAUF_DRAFTER")
    drafter = load_drafter(TRAINED).eval().requires_grad_(False)
    use_onednn(drafter)
    return drafter


def test_a_trained_drafter_is_lossless_on_every_prompt(humaneval, trained):
    assert len(check_lossless(humaneval, trained)) > 2


def test_replay_of_greedy_answers_is_real_decoding(humaneval, trained):
    real, documents = [], []
    for number, ids in enumerate(humaneval.prompts):
        found = speculative_generate(
            humaneval.target, trained, ids, max_new_tokens=NEW, vocabulary=humaneval.vocabulary
        )
        text = torch.cat([ids, torch.tensor(found.tokens)])
        mask = np.arange(len(text)) >= len(ids)
        features = features_of(humaneval.target, text, trained.config.taps).numpy()
        documents.append(TinyDocument(number, text.numpy(), mask, features))
        real.append(found.accepted)
    assert [r.accepted.tolist() for r in replay(trained, humaneval.vocabulary, documents)] == real
    assert sum(map(sum, real)) > 0
    print(f"tau {1 + sum(map(sum, real)) / sum(map(len, real)):.4f} from replay and from real decoding")


def test_in_bf16_every_divergence_is_a_near_tie():
    humaneval = Humaneval(torch.bfloat16)
    results = humaneval.decode(humaneval.scripted(ALTERNATING).to(torch.bfloat16))
    found = [
        (name, divergence(humaneval.target, ids[None], result.tokens, answer))
        for name, ids, answer, result in zip(
            humaneval.names, humaneval.prompts, humaneval.answers, results, strict=True
        )
    ]
    differences = [(name, difference) for name, difference in found if difference]
    print(f"{len(differences)} of {PROMPTS} answers differ in bf16: {differences}")
    assert all(difference["near_tie"] for _, difference in differences)
