"""`cache-builder`: build, estimate, inspect and verify caches."""

import sys
from importlib import import_module

from specauf.errors import run_command, unknown_name
from specauf.sigterm import sigterm_interrupts

# What they need is imported when one is called: torch alone takes seconds.
COMMANDS = {
    "build": "run a target once over a corpus and write the cache; run again to go on",
    "estimate": "bytes and hours that a build will take, from a sample, before anything is written",
    "inspect": "what a cache is made from, its sizes, retained mass, and a decoded sample",
    "shrink": "a smaller cache from one that is there, without the target: fewer log-probabilities, smaller features",
    "verify": "check every object of a cache; --repair builds the bad shards again",
}


def main(argv: list[str] | None = None) -> int:
    """Entry point of the `cache-builder` command; returns the exit status."""
    return run_command(lambda: dispatch(sys.argv[1:] if argv is None else argv))


def dispatch(argv: list[str]) -> None:
    """Run one command; SIGTERM ends it as Ctrl-C does.

    Raises:
        UserError: the command or an option is wrong, or what the command raises.
        KeyboardInterrupt: it was interrupted or terminated.
    """
    with sigterm_interrupts():
        _dispatch(argv)


def _dispatch(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        lines = [f"  {name:<9} {text}" for name, text in COMMANDS.items()]
        print("usage: cache-builder COMMAND [options]\n\n" + "\n".join(lines))
        print("\ncache-builder COMMAND --help lists its options.")
        return
    if argv[0] == "--version":
        from specauf import __version__

        print(__version__)
        return
    name, words = argv[0], argv[1:]
    if name not in COMMANDS:
        raise unknown_name("command", name, COMMANDS)
    import_module("cache_builder.commands").RUN[name](words)


if __name__ == "__main__":
    raise SystemExit(main())
