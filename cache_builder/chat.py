"""The target's chat template: prompts to answer, and which tokens of a given chat are answers."""

import datetime
import functools
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from cache_builder.formats import REASONING, Conversation, Message
from specauf.errors import UserError
from specauf.template_dates import dated_template, plain_template


class TemplateRefusesError(Exception):
    """A chat template will not render these turns, for example two user turns in a row; drops count it by `reason`."""

    reason = "template"


class NoPlaceForReasoningError(TemplateRefusesError):
    """A chat template passes over the thinking that a row holds apart from its answer."""

    reason = "reasoning"


@dataclass(frozen=True)
class ChatRenderer:
    """Text and tokens of conversations under one tokenizer.

    Attributes:
        tokenizer: a fast Hugging Face tokenizer.
        stop_ids: tokens that end an answer.
        options: keyword arguments of the template, such as `enable_thinking`.
        date: what the template prints as today's; None leaves it as it is.
    """

    tokenizer: Any
    stop_ids: frozenset[int]
    options: dict[str, Any]
    date: datetime.date | None = None

    def require_template(self) -> None:
        """Check that chats can be rendered.

        Raises:
            UserError: the tokenizer has no chat template, or cannot map characters to tokens, or the date that the
                template prints cannot be held.
        """
        if not plain_template(self.tokenizer, self.options):
            raise UserError(
                "the target's tokenizer has no chat template: use an instruct model, give one as chat_template in the "
                "target's template_options, or use a text corpus"
            )
        if not getattr(self.tokenizer, "is_fast", False):
            raise UserError("the target's tokenizer is a slow one without character offsets: provide tokenizer.json")
        _ = self._options

    @functools.cached_property
    def _options(self) -> dict[str, Any]:
        """Arguments of the template, and the template itself where it is not the tokenizer's own."""
        if self.date is None:
            return self.options
        return self.options | {"chat_template": dated_template(plain_template(self.tokenizer, self.options), self.date)}

    @functools.cached_property
    def _cutting(self) -> Int[np.ndarray, " tokens"]:
        """Tokens at which a tokenizer cuts a text before all else, so that neither side changes the other."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        return np.array([i for i, token in added.items() if not token.normalized], dtype=np.int64)

    def render(self, messages: Collection[Message], *, answer: bool) -> str:
        """The chat as text; with `answer`, up to where the assistant's next answer begins.

        Raises:
            TemplateRefusesError: the template raises for these turns.
            UserError: there is no template.
        """
        import jinja2

        # The corpus may begin with plain text, so that nobody looked before.
        self.require_template()
        turns = [
            {"role": m.role, "content": m.content} | (dict.fromkeys(REASONING, m.reasoning) if m.reasoning else {})
            for m in messages
        ]
        try:
            text: str = self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=answer, **self._options
            )
        except jinja2.TemplateSyntaxError as error:
            raise UserError(
                f"the chat template cannot be read ({error}): mend it, or give another tokenizer"
            ) from error
        except (jinja2.TemplateError, TypeError) as error:  # of what the template computes
            raise TemplateRefusesError(str(error)) from error
        return text

    def prompt_ids(self, conversation: Conversation) -> Int[np.ndarray, " tokens"]:
        """Tokens of the question, up to where the target's answer begins.

        Raises:
            TemplateRefusesError: the template raises for these turns.
        """
        text = self.render(conversation.question, answer=True)
        return np.asarray(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64)

    def document(self, conversation: Conversation) -> tuple[Int[np.ndarray, " tokens"], Bool[np.ndarray, " tokens"]]:
        """Tokens of a whole conversation, and which of them a target's answer would be.

        Plain text is supervised from its second token on. Of a chat, an answer's tokens are supervised up to and with
        the token that ends it; what the template writes around answers is not.

        Raises:
            TemplateRefusesError: the template raises for these turns.
        """
        if conversation.text is not None:
            ids = np.asarray(self.tokenizer(conversation.text)["input_ids"], dtype=np.int64)
            return ids, np.arange(len(ids)) > 0
        text = self.render(conversation.messages, answer=False)
        self._require_reasoning(conversation.messages)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = np.asarray(encoded["input_ids"], dtype=np.int64)
        offsets = np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        mask = np.zeros(len(ids), dtype=bool)
        for start, end in self._answer_spans(conversation.messages, text):
            first, last = (self._tokens_before(text, position, ids, offsets) for position in (start, end))
            stop = next((i for i in range(first, last) if int(ids[i]) in self.stop_ids), last - 1)
            mask[first : stop + 1] = True
        mask[:1] = False
        return ids, mask

    def _require_reasoning(self, messages: tuple[Message, ...]) -> None:
        """Check that the template writes the first thinking that stands apart; of earlier turns many leave it out."""
        first = next((i for i, m in enumerate(messages) if m.reasoning.strip()), None)
        if first is None:
            return
        if messages[first].reasoning.strip() not in self.render(messages[: first + 1], answer=False):
            raise NoPlaceForReasoningError(f"the thinking of turn {first} is not in the chat")

    def _tokens_before(
        self, text: str, position: int, ids: Int[np.ndarray, " tokens"], offsets: Int[np.ndarray, "tokens 2"]
    ) -> int:
        """How many of the text's tokens lie before a character."""
        cuts = np.flatnonzero(np.isin(ids, self._cutting) & (offsets[:, 1] <= position))
        # From the last cut on: whole chats for both ends of every answer take longer than the target's own pass.
        for first in [*cuts[-1:].tolist(), 0]:
            start = int(offsets[first, 0]) if first else 0
            part = self.tokenizer(text[start:position], add_special_tokens=False)["input_ids"]
            if list(ids[first : first + len(part)]) == part:
                return int(first) + len(part)
        # A token straddles the place. Offsets come second: some tokenizers trim the white space off them.
        return int((offsets[:, 1] <= position).sum())

    def _answer_spans(self, messages: tuple[Message, ...], text: str) -> list[tuple[int, int]]:
        """Character ranges of the answers in the rendered chat, each with what the template puts after it.

        A turn's range lies between the chat rendered up to the turn before it and up to itself. Templates that write a
        turn differently once others follow (they cut old thinking) break that; then the turn's own text is searched
        behind the turns before it.
        """
        spans, cursor = [], 0
        for i, message in enumerate(messages):
            if message.role != "assistant":
                cursor = _behind(text, cursor, message, next(iter(messages[i + 1 :]), None))
                continue
            before, after = self.render(messages[:i], answer=True), self.render(messages[: i + 1], answer=False)
            if text.startswith(before) and text.startswith(after) and after.startswith(before):
                span: tuple[int, int] | None = (len(before), len(after))
            else:
                # Not beyond the turn after it, where the same words may be another answer.
                near = self.render(messages[: i + 2], answer=False)
                end = len(near) if i + 1 < len(messages) and text.startswith(near) else len(text)
                span = self._search(text[:end], self._start(messages[:i], before, text, cursor), message)
            if span is not None:
                spans.append(span)
                cursor = span[1]
        return spans

    def _start(self, earlier: tuple[Message, ...], before: str, text: str, cursor: int) -> int:
        """Where an answer's text can begin: behind what the template writes of the turns before it, if that is there.

        Args:
            earlier: the turns before it.
            before: these rendered, up to where the answer begins.
            text: the whole chat.
            cursor: behind the contents of the turns before it.
        """
        if text.startswith(before):
            return len(before)
        # What a generation prompt ends with may be cut with the thinking that it opens.
        turns = self.render(earlier, answer=False)
        return len(turns) if text.startswith(turns) else cursor

    def _search(self, text: str, start: int, message: Message) -> tuple[int, int] | None:
        """The first place of an answer's text with the token that ends a turn right behind it, else its first place."""
        content = message.content.split("</think>")[-1].strip()
        if not content:
            return None
        named = self.tokenizer.convert_ids_to_tokens(sorted(self.stop_ids))
        stops = sorted((t for t in named if t), key=len, reverse=True)
        ended = re.compile(rf"{re.escape(content)}\s*(?:{'|'.join(map(re.escape, stops))})") if stops else None
        if ended is not None and (match := ended.search(text, start)):
            return match.span()
        found = text.find(content, start)
        return None if found < 0 else (found, found + len(content))


def _behind(text: str, cursor: int, turn: Message, following: Message | None) -> int:
    """Where a turn that is no answer ends in the text; `cursor` when it is not there.

    Some templates put the system's turn into the last question; what is found behind the turn after it is that.
    """
    content = turn.content.strip()
    found = text.find(content, cursor)
    if turn.role == "system" and following is not None:
        moved = -1 < text.find(following.content.strip(), cursor) < found
        found = -1 if moved else found
    return cursor if found < 0 else found + len(content)
