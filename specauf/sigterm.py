"""SIGTERM, which `kill`, `timeout`, systemd and SLURM send: it ends a command as Ctrl-C does, with exit status 143."""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator

from specauf.errors import TerminatedError

_ONCE_SECONDS = 1.0


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Let SIGTERM raise wherever the main thread is, as Ctrl-C does.

    Raises:
        TerminatedError: it came.
    """
    last = float("-inf")

    def stop() -> None:
        nonlocal last
        # `timeout` and whoever ends a group send it twice, and the second must not end the tidying up.
        now, before = time.monotonic(), last
        last = now
        if now - before > _ONCE_SECONDS:
            raise TerminatedError

    with _handler(stop) as listen:
        listen()
        yield


class Sigterm:
    """Notes SIGTERM for work that ranks do together; a context manager, which listens inside.

    Raising wherever it finds the work, in the middle of a collective say, would leave the other ranks waiting.

    Args:
        pass_on: called in the signal handler, to tell processes that this one has started.

    Attributes:
        came: whether it has come.
    """

    def __init__(self, pass_on: Callable[[], object] = lambda: None) -> None:
        self.came = False
        self._pass_on = pass_on
        self._handler = _handler(self._note)

    def __enter__(self) -> "Sigterm":
        self.listen = self._handler.__enter__()
        self.listen()
        return self

    def __exit__(self, *exc: object) -> None:
        self._handler.__exit__(None, None, None)

    def check(self) -> None:
        """Stop when it has come; between two steps of the work.

        Raises:
            TerminatedError: it has.
        """
        if self.came:
            raise TerminatedError

    def _note(self) -> None:
        self.came = True
        self._pass_on()


@contextlib.contextmanager
def _handler(call: Callable[[], object]) -> Iterator[Callable[[], None]]:
    """Gives a function that puts `call` in charge of SIGTERM; at the end whoever was before is again.

    Only the main thread may choose; elsewhere, and where the process was started deaf to it, nothing changes.
    """
    before = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or before is signal.SIG_IGN:
        yield lambda: None
        return

    def listen() -> None:
        signal.signal(signal.SIGTERM, lambda *_: call())

    try:
        yield listen
    finally:
        # None is a handler that was not set from Python.
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
