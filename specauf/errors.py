"""Errors a user can act on, and the one place that turns them into an exit status."""

import difflib
import errno
import os
import select
import signal
import sys
from collections.abc import Callable, Iterable

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(Exception):
    """A mistake in what the user asked for or gave.

    The message is one line that names the field, the value found, the value expected and what to do next.
    Commands print it without a traceback and exit with status 2.
    """


class TerminatedError(KeyboardInterrupt):
    """SIGTERM asked this process to end; it passes through whatever lets Ctrl-C pass."""


def status_of(stopped: KeyboardInterrupt) -> int:
    """The exit status that a shell gives for the signal."""
    return 128 + (signal.SIGTERM if isinstance(stopped, TerminatedError) else signal.SIGINT)


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UserError:
    """Error for a name that is not in a closed set, with the nearest known name and the whole set."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return UserError(f"unknown {kind} {name!r}.{hint} Known: {', '.join(known)}")


def run_command(command: Callable[[], object]) -> int:
    """Run a command line's body; returns the exit status.

    0; 2 after one line on stderr for a `UserError`, for a file that cannot be read or written, or when memory ends; 130
    when interrupted, 143 when terminated; 141 when nobody reads what is printed any more, as behind `| head`.
    """
    try:
        command()
        sys.stdout.flush()
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        return 128 + signal.SIGPIPE
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno in DISK_FULL:
            where = "" if error.filename is None else f"{error.filename}: "
            print(f"error: {where}writing failed ({error.strerror}): free some space and try again", file=sys.stderr)
            return 2
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}; name another file or directory, or mend it", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not _memory_ended(error):
            raise
        print(
            f"error: memory ended ({_first_sentence(error)}): see docs/troubleshooting.md for what takes less",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt as stopped:
        said = "terminated" if isinstance(stopped, TerminatedError) else "interrupted"
        print(f"{said}: run the same command again to go on from here", file=sys.stderr)
        return status_of(stopped)
    return 0


def _memory_ended(error: Exception) -> bool:
    """By name and text, for torch may not be imported."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "DefaultCPUAllocator" in str(error)
    )


def _first_sentence(error: Exception) -> str:
    return " ".join(str(error).split()).split(". ")[0].rstrip(".") or type(error).__name__


def _nobody_reads() -> bool:
    """Whether it is standard output that has no reader; what it still holds is let go of then."""
    output, state = sys.stdout.fileno(), select.poll()
    state.register(output, 0)
    if not state.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return True
