"""The date that a cache's prompts name: a template that prints today's would give other prompts tomorrow."""

import datetime
import re
import sys
from collections.abc import Mapping
from typing import Any

from specauf.cache.schema import Identity
from specauf.errors import UserError

# The entry of the identity's `corpus`; only caches whose template asks for the date have it.
DATE = "template_date"
_CLOCK = "strftime_now"
_CALL = re.compile(_CLOCK + r"""\s*\(\s*(?:format\s*=\s*)?("[^"]*"|'[^']*')\s*\)""")
# Comments, and asking whether there is a clock at all.
_HARMLESS = re.compile(rf"\{{#.*?#\}}|{_CLOCK}\s+is\s", re.DOTALL)


def today() -> datetime.date:
    """Today in UTC, so that it is the same day on every node."""
    return datetime.datetime.now(datetime.UTC).date()


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


def prompt_date(found: Identity | None, template_hash: str, out: str) -> datetime.date | None:
    """The date that a build's prompts name, of a template that asks for it.

    Args:
        found: identity of the cache that is there already.
        template_hash: of the target's template, as identities hold it.
        out: the cache, for messages.

    Returns:
        That of the cache which goes on, else today's. None for a cache that an earlier release began without one: its
        prompts name the day on which each of them was made.

    Raises:
        UserError: the cache's date is none.
    """
    if found is None or found.chat_template_hash != template_hash:
        return today()
    if DATE not in found.corpus:
        print(
            f"{out} was begun by a release that did not keep the date: where the chat template prints today's, prompts "
            "made from now on name another day than those that are there",
            file=sys.stderr,
        )
        return None
    try:
        return datetime.date.fromisoformat(found.corpus[DATE])
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{out}: corpus.{DATE} is {found.corpus[DATE]!r}, expected a date: build into another --out"
        ) from error


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
