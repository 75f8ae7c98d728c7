"""The date that a cache's prompts name: a template that prints today's would give other prompts tomorrow."""

import datetime
import sys

from specauf.cache.schema import Identity
from specauf.errors import UserError

# The entry of the identity's `corpus`; only caches whose template asks for the date have it.
DATE = "template_date"


def today() -> datetime.date:
    """Today in UTC, so that it is the same day on every node."""
    return datetime.datetime.now(datetime.UTC).date()


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
