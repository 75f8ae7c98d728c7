"""`specauf`: fit and validate by LightningCLI; evaluate and report by plain functions."""

import contextlib
import itertools
import sys
from collections.abc import Callable
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import Any

from specauf.configs import find_config
from specauf.errors import UserError, run_command, unknown_name
from specauf.sigterm import sigterm_interrupts

# Imported when called: only `fit` and `validate` need Lightning, only the others may load a target.
COMMANDS: dict[str, tuple[str, str]] = {
    "fit": ("specauf.training_cli:main", "train a drafter from a cache"),
    "validate": ("specauf.training_cli:main", "replay a checkpoint on the cache's held-out documents"),
    "sweep": ("specauf.sweep:sweep", "train every given loss with every given seed, and compare them"),
    "evaluate": ("specauf.evaluation.cli:evaluate", "decode benchmarks speculatively with the real target"),
    "audit": (
        "specauf.evaluation.audit_cli:audit",
        "measure how training fits inference, without the target",
    ),
    "export": (
        "specauf.export.cli:export",
        "write a drafter as z-lab, SGLang, vLLM and llama.cpp load it, or check one",
    ),
    "import": ("specauf.export.cli:import_", "read a z-lab or speculators directory for fit, evaluate and audit"),
    "report": ("specauf.evaluation.report_cli:report", "write Markdown, HTML and plots from evaluation results"),
    "doctor": ("specauf.doctor:doctor", "say what this machine has, and what of it would go wrong later"),
}


def main(argv: list[str] | None = None) -> int:
    """Entry point of the `specauf` command; returns the exit status."""
    return run_command(lambda: dispatch(sys.argv[1:] if argv is None else argv))


def dispatch(argv: list[str]) -> None:
    """Run one command.

    Raises:
        UserError: the command is unknown, or what the command raises.
        KeyboardInterrupt: it was interrupted or terminated.
    """
    if not argv or argv[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
        print(
            "usage: specauf COMMAND [options]\n\n" + "\n".join(lines) + "\n\nspecauf COMMAND --help lists its options."
        )
        return
    if argv[0] == "--version":
        from specauf import __version__

        print(__version__)
        return
    if argv[0] not in COMMANDS:
        raise unknown_name("command", argv[0], COMMANDS)
    expanded = expand_names(argv)  # before the heavy imports: a wrong name is answered at once
    module, function = COMMANDS[argv[0]][0].split(":")
    run: Callable[[list[str]], Any] = getattr(import_module(module), function)
    # Lightning has its own way with SIGTERM, and leaves it alone where somebody else has one.
    with contextlib.nullcontext() if argv[0] in ("fit", "validate") else sigterm_interrupts():
        run(expanded)


def expand_names(argv: list[str]) -> list[str]:
    """Replace bare names by the shipped YAML files: `--model.loss=auf`, `--model.drafter dflash`, `-c fit`.

    Raises:
        UserError: no such config; the message lists those there are.
    """
    out: list[str] = []
    for i, word in enumerate(argv):
        flag, equals, value = word.partition("=")
        if equals and flag in _NAMED:
            out.append(f"{flag}={_resolve(_NAMED[flag], value)}")
        elif i and argv[i - 1] in _NAMED and not word.startswith("-"):
            out.append(_resolve(_NAMED[argv[i - 1]], word))
        else:
            out.append(word)
    return out


_NAMED = {"--model.loss": "loss", "--model.drafter": "drafter", "-c": "", "--config": ""}


def _resolve(kind: str, value: str) -> str:
    if value.startswith(("{", "specauf.")) or ("." in value and not value.endswith((".yaml", ".yml"))):
        return value  # a class path or inline JSON: jsonargparse's business
    return str(find_config(kind, value))


def default_run_directory(kind: str) -> Path:
    """`runs/KIND-DATE-TIME`, for a run that was not told where to go; made here, so that no other run takes it too."""
    name = f"{kind}-{datetime.now():%Y%m%d-%H%M%S}"
    names = (name if n == 0 else f"{name}-{n}" for n in itertools.count())
    while True:
        path = Path("runs") / next(names)
        with contextlib.suppress(FileExistsError):
            path.mkdir(parents=True)
            return path


def newest(pattern: str, what: str, flag: str) -> Path:
    """The newest path that matches a pattern, for commands that were given none.

    Raises:
        UserError: nothing matches.
    """
    found = sorted(Path().glob(pattern), key=lambda p: p.stat().st_mtime)
    if not found:
        raise UserError(f"there is no {what} here ({pattern}): give one with {flag}")
    return found[-1]
