"""Where answers begin and end among the tokens: from the last special token on as by the chat's whole beginning."""

import functools
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from cache_builder.chat import ChatRenderer
from cache_builder.formats import Conversation, Message
from tests.builder.conftest import CHATML, SPECIAL
from tests.builder.test_chat import LLAMA3, MISTRAL

TEMPLATES = (CHATML, LLAMA3, MISTRAL)
# How families of tokenizers treat what stands before a word, and white space beside special tokens.
KINDS: dict[str, tuple[Any, Any, dict[str, bool]]] = {
    "bytes (GPT-2, Qwen, Llama 3)": (None, pre_tokenizers.ByteLevel(add_prefix_space=False), {}),
    "bytes with a space before": (normalizers.NFC(), pre_tokenizers.ByteLevel(add_prefix_space=True), {}),
    "a mark before the first word (T5, Mistral)": (None, pre_tokenizers.Metaspace(prepend_scheme="first"), {}),
    "a mark before every part": (None, pre_tokenizers.Metaspace(prepend_scheme="always"), {"lstrip": True}),
    "a mark as text (Llama 2, Gemma)": (
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), None, {"rstrip": True},
    ),
}  # fmt: skip


@functools.cache
def tokenizer(kind: str) -> Any:
    """Trained on the README, so that words are tokens, and tokens straddle the ends of turns."""
    normalizer, pre_tokenizer, strips = KINDS[kind]
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    if normalizer is not None:
        made.normalizer = normalizer
    if pre_tokenizer is not None:
        made.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=1500, special_tokens=["<unk>"], show_progress=False)
    made.train([str(Path(__file__).parents[2] / "README.md")], trainer)
    made.add_special_tokens([AddedToken(name, normalized=False, special=True, **strips) for name in SPECIAL])
    made.add_tokens([AddedToken("cache", normalized=True)])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", bos_token="<s>")


WORDS = st.sampled_from(
    ["the", "cache", " ", "\n", "\n\n", "é", "e\u0301", "😀", "drafter", ".", "(", "[/INST]", "▁", "</s>"]
)
TURN = st.lists(WORDS, min_size=1, max_size=8).map("".join)


@pytest.mark.parametrize("kind", KINDS)
@given(turns=st.lists(TURN, min_size=2, max_size=6), template=st.sampled_from(TEMPLATES))
@settings(max_examples=60, deadline=None)
def test_places_are_those_of_the_whole_beginning(kind: str, turns: list[str], template: str) -> None:
    tokens = tokenizer(kind)
    stops = frozenset(tokens.convert_tokens_to_ids(["</s>", "<|im_end|>", "<|eot_id|>"]))
    render = ChatRenderer(tokens, stops, {"chat_template": template})
    chat = Conversation(tuple(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(turns)))
    ids, mask = render.document(chat)
    with mock.patch.object(ChatRenderer, "_cutting", np.array([], dtype=np.int64)):
        same, whole = ChatRenderer(tokens, stops, render.options).document(chat)
    assert ids.tolist() == same.tolist()
    assert mask.tolist() == whole.tolist()


def test_a_long_chat_is_not_tokenised_anew_for_every_answer() -> None:
    tokens = tokenizer("bytes (GPT-2, Qwen, Llama 3)")
    render = ChatRenderer(tokens, frozenset(tokens.convert_tokens_to_ids(["<|im_end|>"])), {"chat_template": CHATML})
    chat = Conversation(tuple(Message(("user", "assistant")[i % 2], "the cache " * 20) for i in range(40)))
    with mock.patch.object(type(tokens), "__call__", autospec=True, side_effect=type(tokens).__call__) as called:
        _, mask = render.document(chat)
    whole = len(render.render(chat.messages, answer=False))
    assert sum(len(call.args[1]) for call in called.call_args_list) < 2 * whole
    assert mask.sum() > 40
