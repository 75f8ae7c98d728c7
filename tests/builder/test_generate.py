"""Batched answers against Hugging Face's own `generate` and a plain forward pass of each document."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import cache_builder.prefill
from cache_builder.generate import Answer, answer_all
from cache_builder.sampling import Sampling
from cache_builder.target import Target
from specauf.errors import UserError
from specauf.targets import TargetConfig
from tests.builder.conftest import HIDDEN, LAYERS, SPECIAL, make_target, make_tokenizer

CONFIG = TargetConfig(name="tiny", model="tiny", dtype="float32", taps=(1, 3, 5), mask_token="<|mask|>")
K = 8
VOCAB = 256 + len(SPECIAL)


# A random model rarely says its one end token: with many of them, answers end at uneven lengths.
STOPS = [256 + SPECIAL.index("<|im_end|>"), *range(16, 40)]


def target(model: Any = None, k: int = K) -> Target:
    model = make_target() if model is None else model
    model.generation_config.eos_token_id = STOPS
    model.generation_config.pad_token_id = 256 + SPECIAL.index("<|pad|>")
    return Target(model, make_tokenizer(), CONFIG, k=k)


def prompts(count: int, seed: int = 0, longest: int = 24) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, size=rng.integers(1, longest + 1)).astype(np.int64) for _ in range(count)]


def hf_answer(model: Any, prompt: np.ndarray, new: int) -> np.ndarray:
    ids = torch.from_numpy(prompt)[None]
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
    return made[0].numpy()


@pytest.mark.parametrize("batch_size", [1, 4, 7, 64])
def test_answers_equal_generate_token_by_token(batch_size: int) -> None:
    t, asked = target(), prompts(17)
    answers = answer_all(t, asked, max_new_tokens=20, batch_size=batch_size)
    lengths = {len(a.tokens) - a.prompt_tokens for a in answers}
    assert len(lengths) > 3, "the tiny target must end its answers at different places for this test to say anything"
    for prompt, answer in zip(asked, answers, strict=True):
        np.testing.assert_array_equal(answer.tokens, hf_answer(t.model, prompt, 20))
        assert answer.prompt_tokens == len(prompt)
        assert answer.ended == (int(answer.tokens[-1]) in t.stop_ids)


@pytest.mark.parametrize("seed", [1, 4])
def test_in_bfloat16_where_logits_tie_answers_equal_generate(seed: int) -> None:
    t, asked = target(make_target(seed).to(torch.bfloat16)), prompts(16, seed)
    answers = answer_all(t, asked, max_new_tokens=20, batch_size=1)
    ties = sum(int((a.topk_logprobs[:, 0] == a.topk_logprobs[:, 1]).sum()) for a in answers)
    assert ties > 4, "two tokens must be the most probable ones now and then for this test to say anything"
    for prompt, answer in zip(asked, answers, strict=True):
        np.testing.assert_array_equal(answer.tokens, hf_answer(t.model, prompt, 20))


@pytest.mark.parametrize("prefill_tokens", [1, 40, 2048])
@pytest.mark.parametrize("shared", [8, 30])
def test_a_shared_beginning_is_run_once_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, prefill_tokens: int, shared: int
) -> None:
    monkeypatch.setattr(cache_builder.prefill, "PREFILL_TOKENS", prefill_tokens)
    t = target()
    asked = [np.concatenate([np.arange(40, 40 + shared), p]) for p in prompts(11, seed=5)]
    passes: list[tuple[int, ...]] = []
    forward = t.forward
    monkeypatch.setattr(t, "forward", lambda ids, *a, **k: passes.append(tuple(ids.shape)) or forward(ids, *a, **k))
    answers = answer_all(t, asked, max_new_tokens=8, batch_size=5)
    assert passes[0][0] == 1
    assert passes[0][1] >= shared
    assert max(length for _, length in passes[1:]) <= max(map(len, asked)) - shared
    for prompt, answer in zip(asked, answers, strict=True):
        np.testing.assert_array_equal(answer.tokens, hf_answer(t.model, prompt, 8))
        assert_features_of_document(t, answer)


def assert_features_of_document(t: Target, answer: Answer) -> None:
    with torch.no_grad():
        whole = t.model(torch.from_numpy(answer.tokens)[None], output_hidden_states=True)
    assert answer.features is not None
    expected = torch.cat([whole.hidden_states[tap + 1][0] for tap in t.taps], -1)
    torch.testing.assert_close(answer.features.float(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("features", [True, False])
def test_features_and_topk_equal_a_forward_pass_of_the_document(features: bool) -> None:
    t = target()
    answers = answer_all(t, prompts(9), max_new_tokens=12, batch_size=4, features=features)
    for answer in answers:
        with torch.no_grad():
            whole = t.model(torch.from_numpy(answer.tokens)[None], output_hidden_states=False)
        logprobs = whole.logits[0].log_softmax(-1)[answer.prompt_tokens - 1 : -1]
        exact = logprobs.gather(-1, torch.from_numpy(answer.topk_ids).long())
        np.testing.assert_allclose(answer.topk_logprobs, exact, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(answer.topk_logprobs, logprobs.topk(K).values, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(answer.topk_ids[:, 0], answer.tokens[answer.prompt_tokens :])
        if features:
            assert_features_of_document(t, answer)
        else:
            assert answer.features is None


def other_architecture(name: str, seed: int = 1) -> Any:
    common = {
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 64, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
        "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": 256 + SPECIAL.index("<|im_end|>"),
        "pad_token_id": 256 + SPECIAL.index("<|pad|>"),
    }  # fmt: skip
    torch.manual_seed(seed)
    if name == "gemma2":
        model: Any = Gemma2ForCausalLM(Gemma2Config(**common, sliding_window=8, query_pre_attn_scalar=8))
        model.set_attn_implementation("eager")
    elif name == "mistral":
        model = MistralForCausalLM(MistralConfig(**common, sliding_window=8))
    elif name == "gpt2":  # names its sizes n_embd and so on
        model = GPT2LMHeadModel(GPT2Config(**common))
    elif name == "llama4":  # takes itself for its decoder
        common |= {"intermediate_size_mlp": 64, "num_local_experts": 2}
        model = Llama4ForCausalLM(Llama4TextConfig(**common))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**common, tie_word_embeddings=True))
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("seed", range(4))
def test_capped_logits_in_bfloat16_are_the_targets_own(seed: int) -> None:
    model = other_architecture("gemma2", seed).to(torch.bfloat16)
    model.lm_head.weight.mul_(8)  # so that the cap and the type's steps are felt
    t = target(model)
    ids = torch.randint(0, 256, (1, 12))
    hidden = t.forward(ids, None, torch.arange(12)[None], features=False).hidden[0]
    best, values = t.topk(hidden)
    exact = model(ids).logits[0].float().log_softmax(-1)
    assert exact.max() > -0.5, "flat distributions would feel no cap"
    torch.testing.assert_close(values, exact.gather(-1, best))
    torch.testing.assert_close(best[:, 0], exact.argmax(-1))


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "llama4", "mistral", "qwen3"])
def test_other_architectures_answer_as_generate_does(name: str) -> None:
    t = target(other_architecture(name))
    # What a drafter takes from its target, whatever the target calls it.
    known = t.config_for_drafters()
    assert (known["hidden_size"], known["num_hidden_layers"], known["num_attention_heads"]) == (HIDDEN, LAYERS, 4)
    asked = prompts(8, seed=3)
    for prompt, answer in zip(asked, answer_all(t, asked, max_new_tokens=16, batch_size=4), strict=True):
        np.testing.assert_array_equal(answer.tokens, hf_answer(t.model, prompt, 16))


def test_sampled_answers_depend_on_the_document_alone() -> None:
    t, asked = target(), prompts(10)
    sampling = Sampling(temperature=1.0, top_k=K, top_p=0.95, seed=3)
    numbers = [100 + i for i in range(10)]
    together = answer_all(t, asked, max_new_tokens=10, batch_size=10, sampling=sampling, seeds=numbers)
    alone = answer_all(t, asked[4:5], max_new_tokens=10, batch_size=1, sampling=sampling, seeds=numbers[4:5])
    np.testing.assert_array_equal(together[4].tokens, alone[0].tokens)
    again = answer_all(t, asked, max_new_tokens=10, batch_size=3, sampling=sampling, seeds=numbers)
    assert all((a.tokens == b.tokens).all() for a, b in zip(together, again, strict=True))
    greedy = answer_all(t, asked, max_new_tokens=10, batch_size=10)
    assert any(
        len(a.tokens) != len(b.tokens) or (a.tokens != b.tokens).any() for a, b in zip(together, greedy, strict=True)
    )


def test_drawn_tokens_follow_the_cut_distribution() -> None:
    sampling = Sampling(temperature=0.5, top_k=3, top_p=0.9, seed=0)
    logprobs = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(20_000, 4)
    ids = torch.tensor([7, 5, 3, 1]).expand(20_000, 4)
    drawn = sampling.choose(ids, logprobs, torch.linspace(0, 1, 20_001)[:-1].double())
    weight = torch.tensor([0.25, 0.09])  # squared; the third lies beyond the mass of 0.9
    expected = weight / weight.sum()
    shares = torch.tensor([(drawn == i).double().mean() for i in (7, 5)])
    torch.testing.assert_close(shares.float(), expected, atol=1e-3, rtol=0)
    assert not (drawn == 1).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"top_k": 9}, "sample_top_k is 9"),
        ({"top_p": 0.0}, "sample_top_p is 0.0"),
    ],
)
def test_bad_sampling_is_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sampling(**({"temperature": 1.0, "top_k": 4, "top_p": 1.0, "seed": 0} | change)).require_valid(8)


def test_a_target_with_nan_weights_is_refused() -> None:
    model = make_target()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="NaN or Inf"):
        target(model)


@pytest.mark.parametrize(("taps", "message"), [((7,), "tap 7 of 8 layers, expected 0 to 6"), ((-1, 2), "tap -1")])
def test_taps_outside_the_target_are_refused(taps: tuple[int, ...], message: str) -> None:
    config = TargetConfig(name="tiny", model="tiny", taps=taps, mask_token="<|mask|>")
    with pytest.raises(UserError, match=message):
        Target(make_target(), make_tokenizer(), config, k=K)


def test_k_beyond_the_vocabulary_is_refused() -> None:
    with pytest.raises(UserError, match=f"k is {VOCAB + 1}, the target's vocabulary has {VOCAB}"):
        target(k=VOCAB + 1)


@pytest.mark.parametrize("seed", [0, 2**62, 2**63, 2**64 - 2])
def test_neighbouring_seeds_and_documents_draw_other_numbers(seed: int) -> None:
    drawn = [Sampling(1.0, 4, 1.0, s).uniforms([n], 3) for s in (seed, seed + 1) for n in (0, 1)]
    assert len({tuple(numbers[0].tolist()) for numbers in drawn}) == 4
