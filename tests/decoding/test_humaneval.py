"""SmolLM2 on HumanEval: token for token what `generate(do_sample=False)` gives, whatever the drafter.

SPECAUF_PROMPTS and SPECAUF_NEW_TOKENS make the run shorter (all 164 prompts and 128 tokens take hours on 2 cores);
SPECAUF_DRAFTER names a trained drafter, by default the demo's.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from specauf.checkpoint import load_drafter
from specauf.decoding import replay, speculative_generate
from specauf.drafters import DFlashDrafter, DrafterConfig, TargetVocabulary
from specauf.evaluation.benchmarks import load_benchmark
from specauf.evaluation.divergence import divergence
from specauf.evaluation.run import encode
from specauf.targets import load_target, mask_token_id, resolve_target
from tests.decoding.scripted import ALTERNATING, ALWAYS_RIGHT, ALWAYS_WRONG, ScriptedDrafter
from tests.drafters.tiny import TinyDocument, features_of

pytestmark = pytest.mark.slow
PROMPTS, NEW = int(os.environ.get("SPECAUF_PROMPTS", "164")), int(os.environ.get("SPECAUF_NEW_TOKENS", "128"))
TRAINED = Path(os.environ.get("SPECAUF_DRAFTER", "runs/demo/auf"))


def config_for(target, tokenizer) -> DrafterConfig:
    about = resolve_target("smollm2-135m")
    mask = mask_token_id(about, tokenizer, target.config.vocab_size)
    return DrafterConfig.from_target(target.config.to_dict(), taps=about.taps, mask_token_id=mask)


@pytest.fixture(scope="module")
def smollm2():
    torch.manual_seed(0)
    return load_target(resolve_target("smollm2-135m"))


def greedy(target, ids: torch.Tensor) -> list[int]:
    out = target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
    return out[0, ids.shape[1] :].tolist()


def test_every_drafter_is_lossless_on_every_prompt(smollm2):
    target, tokenizer = smollm2
    config, vocabulary = config_for(target, tokenizer), TargetVocabulary.from_target(target)
    drafters = {"untrained": DFlashDrafter(config).eval()}
    if TRAINED.exists():
        drafters["trained"] = load_drafter(TRAINED).eval()
    accepted: dict[str, list[int]] = {}
    for prompt in load_benchmark("humaneval", PROMPTS):
        ids = encode(tokenizer, prompt.text)
        expected = greedy(target, ids)
        text = [ids[0].tolist() + expected]
        scripted = {
            "right": ScriptedDrafter(config, text, ALWAYS_RIGHT),
            "wrong": ScriptedDrafter(config, text, ALWAYS_WRONG),
            "alternating": ScriptedDrafter(config, text, ALTERNATING),
        }
        for name, drafter in (drafters | scripted).items():
            found = speculative_generate(target, drafter, ids, max_new_tokens=NEW, vocabulary=vocabulary)
            assert found.tokens == expected, f"{prompt.task_id}, {name}"
            accepted.setdefault(name, []).extend(found.accepted[:-1])
    assert set(accepted["right"]) == {config.slots}
    assert set(accepted["wrong"]) == {0}
    assert set(accepted["alternating"]) == {1}
    print({name: len(a) for name, a in accepted.items()}, "cycles but the last, all lossless")


def test_replay_of_greedy_answers_is_real_decoding(smollm2):
    target, tokenizer = smollm2
    if not TRAINED.exists():
        pytest.skip("an untrained drafter accepts nothing: train one with make demo, or name one in SPECAUF_DRAFTER")
    drafter, vocabulary = load_drafter(TRAINED).eval(), TargetVocabulary.from_target(target)
    real, documents = [], []
    for number, prompt in enumerate(load_benchmark("humaneval", PROMPTS)):
        ids = encode(tokenizer, prompt.text)
        found = speculative_generate(target, drafter, ids, max_new_tokens=NEW, vocabulary=vocabulary)
        text = torch.cat([ids[0], torch.tensor(found.tokens)])
        mask = np.arange(len(text)) >= ids.shape[1]
        features = features_of(target, text, drafter.config.taps).numpy()
        documents.append(TinyDocument(number, text.numpy(), mask, features))
        real.append(found.accepted)
    assert [r.accepted.tolist() for r in replay(drafter, vocabulary, documents)] == real
    assert sum(map(sum, real)) > 0
    print(f"tau {1 + sum(map(sum, real)) / sum(map(len, real)):.4f} from replay and from real decoding")


def test_in_bf16_every_divergence_is_a_near_tie(smollm2):
    target = smollm2[0].__class__(smollm2[0].config)
    target.load_state_dict(smollm2[0].state_dict())
    target, tokenizer = target.to(torch.bfloat16).eval(), smollm2[1]
    config = config_for(target, tokenizer)
    differences = []
    for prompt in load_benchmark("humaneval", PROMPTS):
        ids = encode(tokenizer, prompt.text)
        expected = greedy(target, ids)
        drafter = ScriptedDrafter(config, [ids[0].tolist() + expected], ALTERNATING).to(torch.bfloat16)
        found = speculative_generate(target, drafter, ids, max_new_tokens=NEW)
        if difference := divergence(target, ids, found.tokens, expected):
            differences.append((prompt.task_id, difference))
    print(f"{len(differences)} of {PROMPTS} answers differ in bf16: {differences}")
    assert all(d["near_tie"] for _, d in differences)
