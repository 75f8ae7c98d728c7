"""Chat templates that print today's date: what is laid out tomorrow would be another prompt."""

import datetime
import re
from collections.abc import Mapping
from typing import Any

from specauf.errors import UserError

_CLOCK = "strftime_now"
_CALL = re.compile(_CLOCK + r"""\s*\(\s*(?:format\s*=\s*)?("[^"]*"|'[^']*')\s*\)""")
# Comments, and asking whether there is a clock at all.
_HARMLESS = re.compile(rf"\{{#.*?#\}}|{_CLOCK}\s+is\s", re.DOTALL)


def plain_template(tokenizer: Any, options: Mapping[str, Any]) -> str:
    """The template of chats without tools; empty when there is none.

    Args:
        tokenizer: the target's.
        options: keyword arguments of the template; they may hold another one.
    """
    template = options.get("chat_template") or getattr(tokenizer, "chat_template", None) or ""
    return str(template.get("default", "")) if isinstance(template, dict) else str(template)


def asks_date(template: str) -> bool:
    """Whether a template may print today's date."""
    return _CLOCK in template


def dated_template(template: str, date: datetime.date) -> str:
    """A template that prints this date where it printed today's.

    transformers makes plain data of a template's arguments, so no other clock can be passed: the calls are replaced.

    Raises:
        UserError: it asks for the date in a format that does not stand in the call.
    """

    def printed(call: re.Match[str]) -> str:
        quoted = call[1]
        return quoted[0] + date.strftime(quoted[1:-1]) + quoted[0]

    text = _CALL.sub(printed, template)
    if asks_date(_HARMLESS.sub("", text)):
        raise UserError(
            f"the target's chat template uses {_CLOCK} otherwise than as {_CLOCK}('FORMAT'), so that its prompts would "
            "change from day to day: write the format into the call, or a date in its place"
        )
    return text
