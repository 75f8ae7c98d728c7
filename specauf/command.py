"""Command lines made from typed functions, with one-line errors."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TextIO

from jsonargparse import ActionConfigFile, ArgumentParser

from specauf.errors import UserError


class CommandParser(ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Keep the lines that say what is wrong.

        Raises:
            UserError: always.
        """
        raise UserError(one_line(message))


def one_line(message: str) -> str:
    """What jsonargparse says first; it puts details and the traceback's text below, and a reason behind a colon."""
    message = str(message).replace("<class 'list'>", "list, as in [A, B]")
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    if len(lines) > 2 and lines[1].startswith("- Expected a path") and lines[2].startswith("- "):
        del lines[1]  # a class could also be given by a file, which is seldom what was meant
    end = 2
    while end < len(lines) and lines[end - 1].endswith(":"):
        end += 1
    return " ".join(lines[:end]) + " (--help lists the options)"


def run_function(function: Callable[..., Any], argv: list[str], *, positional: str | None = None) -> Any:
    """Parse `argv` (the command's name first) by a function's signature and docstring, and call it.

    Args:
        function: typed, with a Google docstring; its arguments become options.
        argv: command name, then options.
        positional: name of the argument that may also be given without a flag.

    Raises:
        UserError: an option is unknown, missing or of the wrong type.
    """
    parser = CommandParser(prog=f"specauf {argv[0]}", description=(function.__doc__ or "").splitlines()[0])
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file with any of the options")
    parser.add_function_arguments(function)
    words = argv[1:]
    if positional is not None and words and not words[0].startswith("-"):
        taken = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
        given = words[:taken]
        words = [
            f"--{positional}={given[0]}"
            if len(given) == 1 and not positional.endswith("s")
            else _list(positional, given)
        ] + words[taken:]
    config = parser.parse_args(words)
    config.pop("config", None)
    return function(**parser.instantiate_classes(config).as_dict())


def _list(name: str, values: list[str]) -> str:
    return f"--{name}={json.dumps(values)}"


def beside_json(where: str | None) -> TextIO:
    """Where a command's own words go: standard output, unless that takes the JSON."""
    return sys.stderr if where == "-" else sys.stdout


def write_json(where: str | None, content: dict[str, Any]) -> None:
    """Write a report as JSON to a file, or to standard output for `-`.

    Raises:
        UserError: the file cannot be written.
    """
    if where is None:
        return
    text = json.dumps(content, indent=2) + "\n"
    if where == "-":
        sys.stdout.write(text)
        return
    try:
        Path(where).parent.mkdir(parents=True, exist_ok=True)
        Path(where).write_text(text)
    except OSError as error:
        raise UserError(f"--json {where} cannot be written: {error.strerror or error}") from error
