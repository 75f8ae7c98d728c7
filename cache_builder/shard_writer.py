"""Writing shards, where it pays while the target makes the next one."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any


class ShardWriter:
    """Calls a function for each shard, in order; a context manager, which ends when all is written.

    Beside a GPU what the host does for a shard (compressing, digests, the disk) takes a good part of the target's time;
    on a CPU the two would only take each other's cores.

    Args:
        write: writes one shard.
        beside: in a thread of its own; one shard may wait for it.
    """

    def __init__(self, write: Callable[..., object], *, beside: bool) -> None:
        self._write = write
        self._thread = ThreadPoolExecutor(1) if beside else None
        self._last: Future[object] | None = None

    def __call__(self, *shard: Any) -> None:
        """Write a shard, now or soon.

        Raises:
            UserError: what writing this shard raises, or the one before.
        """
        if self._thread is None:
            self._write(*shard)
            return
        self.finish()
        self._last = self._thread.submit(self._write, *shard)

    def finish(self) -> None:
        """Wait until all is written.

        Raises:
            UserError: what writing the last shard raises.
        """
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._thread.shutdown()
        if error is None:
            self.finish()
