"""Which tokens of a chat are answers, under templates of three model families and of some that rewrite old turns."""

from pathlib import Path
from typing import Any

import pytest

from cache_builder.chat import ChatRenderer, TemplateRefusesError
from cache_builder.formats import Conversation, Message, parse_row
from cache_builder.identity import template_hash
from cache_builder.plan import Plan, make_plan
from specauf.errors import UserError
from specauf.evaluation.run import encode
from tests.builder.conftest import CHATML, make_tokenizer, write_jsonl
from tests.builder.test_build import config

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
# As Qwen3's: thinking of earlier answers is cut, so that a chat is no longer the beginning of its continuation.
THINKING = (
    "{% set last = messages | length - 1 %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.index0 != last %}{{ m['content'].split('</think>')[-1].lstrip('\n') }}"
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen3's, too: the last answer gets thinking, if only none, and the prompt can end with that none.
NO_THINKING = (
    "{% set blank = '<think>\\n\\n</think>\\n\\n' %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}{{ blank }}{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}{{ blank }}{% endif %}{% endif %}"
)
# As Mistral's later ones: the system's turn stands in the last question.
MOVED_SYSTEM = (
    "{% set system = messages[0]['content'] %}{% for m in messages[1:] %}{% if m['role'] == 'user' %}[INST] "
    "{% if loop.last or loop.index0 == messages | length - 3 %}{{ system }}\n\n{% endif %}{{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
FAMILIES: dict[str, tuple[str, str, str | None]] = {
    "chatml (Qwen, SmolLM)": (CHATML, "<|im_end|>", None),
    "Llama 3": (LLAMA3, "<|eot_id|>", "<|begin_of_text|>"),
    "Mistral": (MISTRAL, "</s>", "<s>"),
    "Qwen3 with thinking": (THINKING, "<|im_end|>", None),
    "Qwen3 without thinking": (NO_THINKING, "<|im_end|>", None),
}


def renderer(family: str, **options: Any) -> ChatRenderer:
    template, eos, bos = FAMILIES[family]
    tokenizer: Any = make_tokenizer(template, eos, bos)
    return ChatRenderer(tokenizer, frozenset({tokenizer.eos_token_id}), options)


def chat(*contents: str) -> Conversation:
    return Conversation(tuple(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(contents)))


def answers(render: ChatRenderer, conversation: Conversation) -> list[str]:
    """Text of each run of supervised tokens."""
    ids, mask = render.document(conversation)
    runs: list[list[int]] = []
    for i, token in enumerate(ids.tolist()):
        if mask[i]:
            if not mask[i - 1]:
                runs.append([])
            runs[-1].append(token)
    return [str(render.tokenizer.decode(run)) for run in runs]


@pytest.mark.parametrize("family", list(FAMILIES)[:3])
@pytest.mark.parametrize("answer", ["because", "ünïcode 😀 → done", "two\n\nlines", "user: not a turn [/INST"])
def test_only_answers_with_their_end_are_supervised(family: str, answer: str) -> None:
    render = renderer(family)
    found = answers(render, chat("why?", answer, "and then?", "nothing"))
    assert [text.strip() for text in found] == [answer + FAMILIES[family][1], "nothing" + FAMILIES[family][1]]


@pytest.mark.parametrize("thinking", [None, False])
@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize(
    "turns",
    [
        ("same", "same", "same", "same"),
        ("Is it Paris or Rome?", "Paris", "sure?", "Yes, I am sure."),
        ("Paris", "Is it Paris or Rome?", "Paris", "Paris"),
        ("Say assistant", "assistant", "Say assistant", "assistant"),
    ],
)
def test_an_answer_that_repeats_the_question_is_found_in_its_place(
    turns: tuple[str, ...], family: str, thinking: bool | None
) -> None:
    render = renderer(family, **({} if thinking is None else {"enable_thinking": thinking}))
    found, end = answers(render, chat(*turns)), FAMILIES[family][1]
    if family == "Qwen3 without thinking" and thinking is None:
        found[-1] = found[-1].removeprefix("<think>\n\n</think>\n\n")  # the target would have to say it
    assert [text.strip() for text in found] == [turns[1] + end, turns[3] + end]


def places(render: ChatRenderer, conversation: Conversation) -> list[int]:
    """Where in the text each run of supervised tokens begins; the tests' tokens are bytes and special tokens."""
    ids, mask = render.document(conversation)
    starts = [i for i in range(len(ids)) if mask[i] and not mask[i - 1]]
    return [len(render.tokenizer.decode(ids[:start])) for start in starts]


def test_of_equal_words_those_of_the_answer_are_supervised() -> None:
    for family in ("Qwen3 with thinking", "Qwen3 without thinking"):
        render = renderer(family)
        conversation = chat("same", "<think>hm</think>\nsame", "same", "same")
        if family == "Qwen3 without thinking":
            conversation = chat("same", "same", "same", "same")
        text = render.render(conversation.messages, answer=False)
        header = "<|im_start|>assistant\n"
        first = text.index(header)
        assert places(render, conversation) == [first + len(header), text.index(header, first + 1) + len(header)]


def test_an_answer_that_comes_again_is_found_where_only_the_last_turn_ends_with_a_stop() -> None:
    """As gpt-oss' template writes them."""
    template = (
        "{% for m in messages %}<|start|>{{ m['role'] }}: {{ m['content'] }}"
        "{% if m['role'] == 'assistant' and loop.last %}<|eot_id|>{% else %}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant: {% endif %}"
    )
    tokenizer: Any = make_tokenizer(template, "<|eot_id|>")
    # One of the stops is a token that this tokenizer does not have.
    render = ChatRenderer(tokenizer, frozenset({tokenizer.eos_token_id, 99_999}), {})
    found = answers(render, chat("q1", "ok", "q2", "fine", "q3", "ok"))
    assert [text.removesuffix("<|eot_id|>") for text in found] == ["ok", "fine", "ok"]


@pytest.mark.parametrize("question", ["Is it Paris or Rome?", "Paris"])
def test_a_question_is_no_answer_where_old_thinking_is_cut(question: str) -> None:
    conversation = chat(question, "<think>hm</think>\nParis", "sure?", "<think>x</think>\nYes, I am sure.")
    found = answers(renderer("Qwen3 with thinking"), conversation)
    assert found == ["Paris<|im_end|>", "<think>x</think>\nYes, I am sure.<|im_end|>"]


@pytest.mark.parametrize("system", ["Say Paris.", "Be brief."])
def test_an_answer_is_found_where_the_template_moves_the_turn_of_the_system(system: str) -> None:
    tokenizer: Any = make_tokenizer(MOVED_SYSTEM, "</s>")
    render = ChatRenderer(tokenizer, frozenset({tokenizer.eos_token_id}), {})
    turns = chat("Is it Paris or Rome?", "Paris", "sure?", "Yes, I am sure.").messages
    found = answers(render, Conversation((Message("system", system), *turns)))
    assert [text.strip() for text in found] == ["Paris</s>", "Yes, I am sure.</s>"]


# As Qwen3's and gpt-oss': thinking may stand apart from the answer.
APART = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m.NAME is defined and loop.last %}"
    "<think>\n{{ m.NAME | trim }}\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("name", ["reasoning_content", "thinking"])
@pytest.mark.parametrize("column", ["reasoning_content", "reasoning", "thinking"])
def test_thinking_that_stands_apart_is_supervised_with_its_answer(name: str, column: str) -> None:
    turns = [("user", "why?", None), ("assistant", "so", "hm\n"), ("user", "and?", None), ("assistant", "thus", "oh")]
    row = {"messages": [{"role": role, "content": text, column: thought} for role, text, thought in turns]}
    render = ChatRenderer(make_tokenizer(APART.replace("NAME", name)), frozenset({269}), {})
    found = answers(render, parse_row(row, None, "row"))
    assert found == ["so<|im_end|>", "<think>\noh\n</think>\n\nthus<|im_end|>"]


def test_thinking_that_the_template_passes_over_leaves_the_row_out() -> None:
    turns = (Message("user", "why?"), Message("assistant", "so", "hm"))
    with pytest.raises(TemplateRefusesError) as refused:
        renderer("Llama 3").document(Conversation(turns))
    assert refused.value.reason == "reasoning"
    renderer("Llama 3").prompt_ids(Conversation(turns))  # the target answers anew


def test_answers_that_differ_in_their_thinking_are_no_duplicates(tiny_target_dir: Path, tmp_path: Path) -> None:
    def plan(*thoughts: object) -> Plan:
        turns = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "so"}]
        rows = [{"messages": [turns[0], turns[1] | {"thinking": thought}]} for thought in thoughts]
        corpus = write_jsonl(tmp_path / "corpus.jsonl", rows)
        return make_plan(config(tiny_target_dir, corpus, tmp_path / "cache", regenerate=False))

    assert plan("a", "b", "a").drops == {"duplicate": 1}
    assert plan("a", "b").fingerprint == plan("a", "b", "b").fingerprint != plan("a", "c").fingerprint
    assert plan(None, "", True).drops == {"duplicate": 2}


def test_old_thinking_that_the_template_cuts_is_not_looked_for() -> None:
    family = "Qwen3 with thinking"
    found = answers(renderer(family), chat("why?", "<think>hm</think>\nbecause", "and?", "<think>so</think>\nthus"))
    assert found == ["because<|im_end|>", "<think>so</think>\nthus<|im_end|>"]


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_prompt_ends_where_the_answer_begins(family: str) -> None:
    render = renderer(family)
    conversation = chat("why?", "because")
    ids, mask = render.document(conversation)
    prompt = render.prompt_ids(conversation)
    assert prompt.tolist() == ids[: int(mask.argmax())].tolist()


def test_a_template_that_refuses_is_told_apart() -> None:
    conversation = Conversation((Message("system", "be brief"), Message("user", "why?"), Message("assistant", "so")))
    with pytest.raises(TemplateRefusesError, match="only user and assistant"):
        renderer("Mistral").document(conversation)


def test_what_a_template_cannot_compute_leaves_the_row_out_and_a_broken_one_is_one_line() -> None:
    for template, error in (("{{ messages[0]['content'] + 1 }}", TemplateRefusesError), ("{% if %}", UserError)):
        render = ChatRenderer(make_tokenizer(template), frozenset(), {})
        with pytest.raises(error):
            render.prompt_ids(chat("hello"))


def test_a_base_model_without_a_template_is_one_line() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template: use an instruct model"):
        ChatRenderer(tokenizer, frozenset({0}), {}).require_template()
    with pytest.raises(UserError, match="no chat template: use an instruct model"):
        ChatRenderer(tokenizer, frozenset({0}), {}).prompt_ids(chat("why?"))


def test_a_template_among_the_options_stands_in_for_the_tokenizers() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    render = ChatRenderer(tokenizer, frozenset({269}), {"chat_template": CHATML})
    assert answers(render, chat("why?", "so")) == ["so<|im_end|>"]
    hashes = {template_hash(tokenizer, {"chat_template": text}) for text in (CHATML, LLAMA3)}
    assert len(hashes - {template_hash(tokenizer, {})}) == 2
    assert encode(tokenizer, "why?", render.options).tolist() == [render.prompt_ids(chat("why?")).tolist()]


def test_plain_text_is_supervised_from_its_second_token() -> None:
    ids, mask = renderer("Llama 3").document(Conversation(text="some words"))
    assert mask.tolist() == [False] + [True] * (len(ids) - 1)
