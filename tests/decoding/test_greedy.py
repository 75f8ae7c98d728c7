"""Greedy speculative decoding gives what plain greedy decoding gives, whatever the drafter."""

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)

from specauf.decoding import speculative_generate, speculative_generate_batch, speculative_stream
from specauf.drafters import Proposal, TargetVocabulary
from specauf.errors import UserError
from tests.decoding.scripted import ALTERNATING, ALWAYS_RIGHT, ALWAYS_WRONG, ScriptedDrafter
from tests.drafters.tiny import BLOCK, FAMILIES, VOCAB, greedy_answer, prompt, tiny_config, tiny_dflash, tiny_target
from tests.processes import forked

NEW = 31


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [1, 6, 13])
def test_output_is_that_of_generate(family: str, length: int):
    target = tiny_target(family)
    ids = prompt(length, seed=length)
    expected = greedy_answer(target, ids, NEW)
    for drafter in (None, tiny_dflash(target)):
        result = speculative_generate(target, drafter, ids, max_new_tokens=NEW)
        assert result.tokens == expected
        assert sum(a + 1 for a in result.accepted) in (len(expected) - 1, len(expected))


@pytest.mark.parametrize(
    ("right", "cycle"),
    [(ALWAYS_RIGHT, BLOCK - 1), (ALWAYS_WRONG, 0), (ALTERNATING, 1)],
    ids=["right", "wrong", "alternating"],
)
def test_adversarial_drafters_change_the_cycles_and_not_the_output(right, cycle: int):
    target = tiny_target()
    ids = prompt(7)
    expected = greedy_answer(target, ids, NEW)
    drafter = ScriptedDrafter(tiny_config(target), [ids.tolist() + expected], right)
    result = speculative_generate(target, drafter, ids, max_new_tokens=NEW)
    assert result.tokens == expected
    assert result.accepted[:-1] == [cycle] * (result.cycles - 1)
    # The drafter's context holds the prompt and all that was committed, except the anchor.
    assert result.cycles == -(-(NEW - 1) // (cycle + 1))


def test_stop_tokens_end_the_answer_inside_a_block():
    target = tiny_target()
    ids = prompt(7)
    expected = greedy_answer(target, ids, NEW)
    for position in range(1, 14):
        stop = expected[position]
        end = expected.index(stop) + 1
        drafter = ScriptedDrafter(tiny_config(target), [ids.tolist() + expected], ALWAYS_RIGHT)
        result = speculative_generate(target, drafter, ids, max_new_tokens=NEW, stop_token_ids=[stop])
        assert result.tokens == expected[:end]
        # Tokens behind the stop were accepted but not put out, so they do not count.
        assert 1 + sum(result.accepted) <= end
        assert result.accepted == [BLOCK - 1] * (result.cycles - 1) + result.accepted[-1:]


def test_the_targets_own_stop_tokens_are_the_default():
    target = tiny_target()
    ids = prompt(7)
    expected = greedy_answer(target, ids, NEW)
    target.generation_config.eos_token_id = [expected[9], 1]
    result = speculative_generate(target, None, ids, max_new_tokens=NEW)
    assert result.tokens == expected[: expected.index(expected[9]) + 1]
    assert speculative_generate(target, None, ids, max_new_tokens=NEW, stop_token_ids=[]).tokens == expected
    given = torch.tensor([expected[9]])
    assert speculative_generate(target, None, ids, max_new_tokens=NEW, stop_token_ids=given).tokens == result.tokens


@pytest.mark.parametrize("new", [1, 2, 3, 6, 7])
def test_short_answers_have_exactly_the_length_asked_for(new: int):
    target = tiny_target()
    ids = prompt(7)
    expected = greedy_answer(target, ids, new)
    for right in (ALWAYS_RIGHT, ALWAYS_WRONG):
        drafter = ScriptedDrafter(tiny_config(target), [ids.tolist() + greedy_answer(target, ids, NEW)], right)
        assert speculative_generate(target, drafter, ids, max_new_tokens=new).tokens == expected


def test_a_shorter_block_than_trained():
    target = tiny_target()
    ids = prompt(7)
    expected = greedy_answer(target, ids, NEW)
    for block in (2, 4):
        drafter = ScriptedDrafter(tiny_config(target), [ids.tolist() + expected], ALWAYS_RIGHT)
        result = speculative_generate(target, drafter, ids, max_new_tokens=NEW, block_size=block)
        assert result.tokens == expected
        assert max(result.accepted) == block - 1
        assert (
            speculative_generate(target, tiny_dflash(target), ids, max_new_tokens=NEW, block_size=block).tokens
            == expected
        )


@pytest.mark.parametrize(
    ("family", "attention"), [("llama", "sdpa"), ("qwen3", "sdpa"), ("gemma", "sdpa"), ("gemma", "eager")]
)
def test_prompts_decoded_together_are_as_if_decoded_alone(family: str, attention: str):
    target = tiny_target(family)
    target.set_attn_implementation(attention)
    drafter = tiny_dflash(target)
    prompts = [prompt(length, seed=length) for length in (3, 9, 1, 14)]
    alone = [speculative_generate(target, drafter, p, max_new_tokens=NEW) for p in prompts]
    # Answers of different lengths: the second ends early.
    stop = [alone[1].tokens[4]]
    alone = [speculative_generate(target, drafter, p, max_new_tokens=NEW, stop_token_ids=stop) for p in prompts]
    together = speculative_generate_batch(target, drafter, prompts, max_new_tokens=NEW, stop_token_ids=stop)
    assert [r.tokens for r in together] == [r.tokens for r in alone]
    assert [r.accepted for r in together] == [r.accepted for r in alone]
    plain = speculative_generate_batch(target, None, prompts, max_new_tokens=NEW, stop_token_ids=stop)
    assert [r.tokens for r in plain] == [r.tokens for r in alone]


def test_a_prompt_that_lags_behind_reads_no_position_beyond_its_end():
    """Learned positions are a table: the row that accepts nothing must not be asked for more than its answer."""
    torch.manual_seed(0)
    shape = GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=4, n_head=4, n_positions=32, initializer_range=0.3, eos_token_id=1
    )
    target = GPT2LMHeadModel(shape).eval().requires_grad_(False)
    prompts, new = [prompt(18, seed=18), prompt(3, seed=3)], 14
    expected = [greedy_answer(target, p, new) for p in prompts]
    texts = [p.tolist() + answer for p, answer in zip(prompts, expected, strict=True)]

    class Uneven(ScriptedDrafter):
        def draft(self, memory, *args):
            proposal = super().draft(memory, *args)
            short = torch.tensor([length < 18 for length in memory.lengths])
            return Proposal((proposal.tokens + short[:, None]) % VOCAB)

    drafter = Uneven(tiny_config(tiny_target()), texts, ALWAYS_RIGHT)
    together = speculative_generate_batch(target, drafter, prompts, max_new_tokens=new)
    assert [r.tokens for r in together] == expected
    assert max(together[0].accepted) > max(together[1].accepted) == 0


def test_windows_by_another_name_are_not_decoded_together():
    shape = GPTNeoConfig(
        vocab_size=VOCAB, hidden_size=32, num_layers=4, num_heads=4, attention_types=[[["global", "local"], 2]],
        window_size=5, max_position_embeddings=64, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    target = GPTNeoForCausalLM(shape).eval().requires_grad_(False)
    prompts = [prompt(length, seed=length) for length in (2, 5)]
    with pytest.raises(UserError, match="sliding-window layers"):
        speculative_generate_batch(target, None, prompts, max_new_tokens=8)
    assert speculative_generate(target, None, prompts[1], max_new_tokens=8).tokens == greedy_answer(
        target, prompts[1], 8
    )


def test_what_cannot_be_decoded_is_said_before_the_first_token():
    target = tiny_target()
    with pytest.raises(UserError, match="max_new_tokens: 0 found"):
        speculative_stream(target, None, [prompt(3)], max_new_tokens=0)
    elsewhere = tiny_dflash(target).to("meta")
    with pytest.raises(UserError, match="drafter: on meta, the target on cpu"):
        speculative_generate(target, elsewhere, prompt(3), max_new_tokens=4)


def test_batched_prompts_accept_different_numbers_in_one_cycle():
    target = tiny_target()
    prompts = [prompt(4, seed=1), prompt(8, seed=2)]
    texts = [p.tolist() + greedy_answer(target, p, NEW) for p in prompts]
    lengths = []
    drafter = ScriptedDrafter(tiny_config(target), texts, lambda k: lengths.append(k) or len(lengths) % 7 != 0)
    together = speculative_generate_batch(target, drafter, prompts, max_new_tokens=NEW)
    assert [text[len(p) :] for p, text in zip(prompts, texts, strict=True)] == [r.tokens for r in together]
    assert together[0].accepted != together[1].accepted


def test_stream_gives_the_tokens_in_order_with_each_cycles_statistics():
    target = tiny_target()
    ids = prompt(7)
    result = speculative_generate(target, tiny_dflash(target), ids, max_new_tokens=NEW)
    cycles = list(speculative_stream(target, tiny_dflash(target), [ids], max_new_tokens=NEW))
    assert [t for c in cycles for t in c.tokens] == result.tokens
    assert [c.number for c in cycles] == list(range(len(cycles)))
    assert (cycles[0].accepted, cycles[0].drafted, len(cycles[0].tokens)) == (0, 0, 1)
    assert all(c.drafted == BLOCK - 1 for c in cycles[1:-4])
    parts = (result.prefill_seconds, result.draft_seconds, result.verify_seconds, result.other_seconds)
    assert all(part > 0 for part in parts)
    assert result.seconds == pytest.approx(sum(parts))


def test_a_reduced_draft_vocabulary_stays_lossless_and_drafts_only_its_tokens():
    target = tiny_target()
    ids = prompt(7)
    vocabulary = TargetVocabulary.from_target(target).restrict(torch.arange(5, 20))
    drafter, seen = tiny_dflash(target), []
    propose = drafter.propose
    drafter.propose = lambda *args: seen.append(propose(*args)) or seen[-1]
    result = speculative_generate(target, drafter, ids, max_new_tokens=NEW, vocabulary=vocabulary)
    assert result.tokens == greedy_answer(target, ids, NEW)
    drafted = torch.cat([p.tokens.flatten() for p in seen])
    assert 5 <= int(drafted.min()) <= int(drafted.max()) < 20


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_size": BLOCK + 1}, "block_size: 7 found, 2 to 6 expected"),
        ({"block_size": 1}, "block_size: 1 found"),
        ({"max_new_tokens": 0}, "max_new_tokens: 0 found"),
        ({"temperature": -1.0}, r"temperature: -1\.0 found"),
        ({"temperature": 1.0, "top_p": 0.0}, r"top_p: 0\.0 found"),
        ({"temperature": 1.0, "top_k": 0}, "top_k: 0 found"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message: str):
    target = tiny_target()
    with pytest.raises(UserError, match=message):
        speculative_generate(target, tiny_dflash(target), prompt(5), **({"max_new_tokens": 4} | settings))


def test_a_drafter_that_cannot_sit_on_the_target_is_refused():
    target = tiny_target()
    with pytest.raises(UserError, match="vocab_size: 61 given, 64 expected"):
        speculative_generate(target, tiny_dflash(target, vocab_size=64), prompt(5), max_new_tokens=4)
    with pytest.raises(UserError, match="reads a sketch of 10 numbers"):
        speculative_generate(target, tiny_dflash(target, feature_dim=10), prompt(5), max_new_tokens=4)
    with pytest.raises(UserError, match="an empty prompt"):
        speculative_generate(target, None, torch.zeros(1, 0, dtype=torch.int64), max_new_tokens=4)
    with pytest.raises(UserError, match="2 prompts found, 1 expected"):
        speculative_generate(target, None, torch.zeros(2, 3, dtype=torch.int64), max_new_tokens=4)


def decode_what_are_no_prompts() -> None:
    for prompts in (torch.zeros(3, dtype=torch.int64), [[1, 2]], [torch.zeros(1, 3, dtype=torch.int64)]):
        with pytest.raises(UserError, match=r"prompts: one is .*, tensors of ids"):
            speculative_generate_batch(tiny_target(), None, prompts, max_new_tokens=4)
    with pytest.raises(UserError, match="input_ids: a list found"):
        speculative_generate(tiny_target(), None, [1, 2], max_new_tokens=4)


def test_what_are_no_prompts_is_one_line_where_types_are_not_checked():
    done = forked(decode_what_are_no_prompts)
    assert done.returncode == 0, done.stderr


def test_several_prompts_on_sliding_windows_are_refused_and_one_is_right():
    target = tiny_target("mistral")  # a window and no layer_types, as its released configs
    assert target.config.sliding_window == 7
    with pytest.raises(UserError, match="prompts: 2 found, 1 expected"):
        speculative_generate_batch(target, None, [prompt(3), prompt(4)], max_new_tokens=4)
    # A window that nothing reaches is none.
    short = speculative_generate_batch(target, None, [prompt(2), prompt(3)], max_new_tokens=4)
    assert [r.tokens for r in short] == [greedy_answer(target, prompt(n), 4) for n in (2, 3)]
    target.config.layer_types = ["linear_attention"] * 4
    with pytest.raises(UserError, match="layer_types: linear_attention"):
        speculative_generate(target, None, prompt(3), max_new_tokens=4)


def test_a_target_with_a_state_is_refused():
    shape = {"vocab_size": 61, "hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2}
    target = RwkvForCausalLM(RwkvConfig(**shape, context_length=64)).eval()  # without layer_types
    with pytest.raises(UserError, match="target: RwkvForCausalLM keeps a state"):
        speculative_generate(target, None, prompt(3), max_new_tokens=4)


def test_several_prompts_with_alibi_are_refused_and_one_is_right():
    sizes = {"vocab_size": 61, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}
    target = BloomForCausalLM(BloomConfig(**sizes, bos_token_id=0, eos_token_id=1)).eval().requires_grad_(False)
    with pytest.raises(UserError, match="prompts: 2 found, 1 expected for a target with ALiBi"):
        speculative_generate_batch(target, None, [prompt(3), prompt(4)], max_new_tokens=4)
    assert speculative_generate(target, None, prompt(6), max_new_tokens=9).tokens == greedy_answer(target, prompt(6), 9)


def test_several_prompts_need_attention_that_reads_a_mask():
    target = tiny_target()
    target.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UserError, match="prompts: 2 found, 1 expected for a target with attention flash_attention_2"):
        speculative_generate_batch(target, None, [prompt(3), prompt(4)], max_new_tokens=4)


def test_rotary_frequencies_that_change_on_the_way_are_refused():
    target = tiny_target()
    target.config.rope_parameters |= {"rope_type": "longrope", "original_max_position_embeddings": 12}
    assert len(speculative_generate(target, None, prompt(3), max_new_tokens=9).tokens) == 9
    with pytest.raises(UserError, match="rope_type: longrope changes its frequencies beyond 12 tokens"):
        speculative_generate(target, None, prompt(4), max_new_tokens=9)
    assert speculative_generate(target, None, prompt(13), max_new_tokens=9).tokens  # beyond them from the first pass on
    target.config.rope_parameters["rope_type"] = "dynamic"
    with pytest.raises(UserError, match="rope_type: dynamic"):
        speculative_generate(target, None, prompt(13), max_new_tokens=9)
