"""Rows of data sets as conversations: the four shapes that chat data comes in, and plain text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, get_args

from specauf.errors import UserError, unknown_name

Format = Literal["messages", "conversations", "prompt", "turns", "text"]
FORMATS: tuple[str, ...] = get_args(Format)
ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant", "bot": "assistant",
    "model": "assistant", "tool": "tool", "function": "tool", "observation": "tool", "function_call": "assistant",
}  # fmt: skip
PROMPTS = ("prompt", "instruction", "question", "input", "query")
RESPONSES = ("response", "completion", "answer", "output", "chosen")
# What rows, and chat templates, call the thinking before an answer, where it stands apart from the answer.
REASONING = ("reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class Message:
    """One turn.

    Attributes:
        role: `system`, `user`, `assistant` or `tool`.
        content: its text.
        reasoning: the thinking before it, where the row has it apart.
    """

    role: str
    content: str
    reasoning: str = ""


@dataclass(frozen=True)
class Conversation:
    """One document of a corpus: either turns or plain text.

    Attributes:
        messages: the turns, empty for plain text.
        text: the whole document when it is plain text.
    """

    messages: tuple[Message, ...] = ()
    text: str | None = None

    @property
    def question(self) -> tuple[Message, ...]:
        """The turns before the first answer: what a regenerating build asks the target."""
        first = next((i for i, m in enumerate(self.messages) if m.role == "assistant"), len(self.messages))
        return self.messages[:first]

    @property
    def answered(self) -> bool:
        """Whether any turn holds an answer's text."""
        return any(m.role == "assistant" and m.content.strip() for m in self.messages)


def parse_row(row: object, form: Format | None, where: str) -> Conversation:
    """A conversation from one row.

    Args:
        row: a mapping of columns.
        form: how to read it; None looks for the columns that each format needs.
        where: file and line, or data set and row, for messages.

    Raises:
        UserError: the row does not have that format; names the field, what was found and what was expected.
    """
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: the row is {_kind(row)}, expected an object with a column such as messages")
    form = detect(row, where) if form is None else form
    if form not in FORMATS:
        raise unknown_name("corpus format", str(form), FORMATS)
    if form == "text":
        return Conversation(text=_text(_column(row, "text", where), f"{where}: text"))
    if form == "turns":
        turns = _list(_column(row, "turns", where), f"{where}: turns")
        return Conversation(tuple(Message("user", _text(t, f"{where}: turns[{i}]")) for i, t in enumerate(turns)))
    if form == "prompt":
        return _pair(row, where)
    return _turns(row, form, where)


def detect(row: Mapping[str, Any], where: str) -> Format:
    """The first format whose column the row has.

    Raises:
        UserError: it has none of them.
    """
    for form in ("messages", "conversations", "turns", "text"):
        if row.get(form) is not None:
            return form
    if any(name in row for name in PROMPTS):
        return "prompt"
    raise UserError(
        f"{where}: columns are {', '.join(map(repr, list(row)[:8])) or 'none'}, expected messages, conversations, "
        "turns, text or a prompt with its response"
    )


def _pair(row: Mapping[str, Any], where: str) -> Conversation:
    name = next((n for n in PROMPTS if isinstance(row.get(n), str | list)), None)
    if name is None:
        _column(row, "prompt", where)
        raise UserError(f"{where}: prompt is {_kind(row['prompt'])}, expected text or messages")
    messages = _system(row, where)
    value = row[name]
    if isinstance(value, str):
        # Alpaca keeps the material that an instruction speaks of in a second column.
        extra = row.get("input") if name == "instruction" else None
        question = _text(value, f"{where}: {name}")
        if isinstance(extra, str) and extra.strip():
            question += "\n\n" + _text(extra, f"{where}: input")
        messages.append(Message("user", question))
    else:
        messages += [_message(m, f"{where}: {name}[{i}]") for i, m in enumerate(_list(value, f"{where}: {name}"))]
    answer = next((n for n in RESPONSES if row.get(n) is not None and n != name), None)
    if answer is not None:
        value = row[answer]
        if isinstance(value, list):
            value = [_message(m, f"{where}: {answer}[{i}]") for i, m in enumerate(value)]
            messages += [m for m in value if m.role != "user"]
        else:
            messages.append(Message("assistant", _text(value, f"{where}: {answer}")))
    return Conversation(tuple(messages))


def _turns(row: Mapping[str, Any], form: str, where: str) -> Conversation:
    turns = _list(_column(row, form, where), f"{where}: {form}")
    return Conversation((*_system(row, where), *(_message(m, f"{where}: {form}[{i}]") for i, m in enumerate(turns))))


def _system(row: Mapping[str, Any], where: str) -> list[Message]:
    system = row.get("system")
    if system is None or (isinstance(system, str) and not system.strip()):
        return []
    return [Message("system", _text(system, f"{where}: system"))]


def _message(value: object, where: str) -> Message:
    if not isinstance(value, Mapping):
        raise UserError(f"{where} is {_kind(value)}, expected an object with role and content")
    role = value.get("role", value.get("from"))
    if not isinstance(role, str):
        raise UserError(f"{where}.role is {_kind(role)}, expected one of {', '.join(sorted(ROLES))}")
    if role.strip().lower() not in ROLES:
        raise UserError(f"{where}.role is {role[:40]!r}, expected one of {', '.join(sorted(ROLES))}")
    name = "value" if "value" in value and "content" not in value else "content"
    if value.get("tool_calls"):
        raise UserError(f"{where} holds tool_calls, which the builder does not render: leave such rows out")
    thought = next((n for n in REASONING if value.get(n) and isinstance(value[n], str | list)), None)
    reasoning = "" if thought is None else _content(value[thought], f"{where}.{thought}")
    return Message(ROLES[role.strip().lower()], _content(value.get(name), f"{where}.{name}"), reasoning)


def _content(value: object, where: str) -> str:
    """Text, or the text parts of a list of parts."""
    if not isinstance(value, list):
        return _text(value, where)
    parts = []
    for i, part in enumerate(value):
        if not isinstance(part, Mapping) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, Mapping) else part
            raise UserError(f"{where}[{i}] is {_kind(kind)} {str(kind)[:40]!r}, expected a part of type text")
        parts.append(_text(part.get("text"), f"{where}[{i}].text"))
    return "".join(parts)


def _column(row: Mapping[str, Any], name: str, where: str) -> Any:
    if name not in row:
        columns = ", ".join(map(repr, list(row)[:8])) or "none"
        raise UserError(f"{where}: column {name} is missing, found {columns}: name another --corpus_format")
    return row[name]


def _list(value: object, where: str) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        _wrong(value, where, "a list")
    return value


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        _wrong(value, where, "text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where} holds half of a surrogate pair at character {error.start}: fix or drop the row"
        ) from error
    return value


def _wrong(value: object, where: str, expected: str) -> NoReturn:
    raise UserError(f"{where} is {_kind(value)}, expected {expected}")


def _kind(value: object) -> str:
    """What a JSON value is, in a user's words."""
    names: dict[type, str] = {type(None): "missing or null", bool: "true or false", int: "a number", float: "a number"}
    names |= {str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
