"""How long the parts of a cycle took, without waiting for the device between them."""

import time
from typing import Any

import torch


class Stopwatch:
    """Laps of work that may only be queued on a GPU; starts as it is made.

    Args:
        device: that does the work. A GPU notes the moments itself, in the order of its queue.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._device = device
        self._started = time.perf_counter()
        self._marks = [self._mark()]

    def lap(self) -> None:
        """End a lap and begin the next."""
        self._marks.append(self._mark())

    def read(self) -> tuple[list[float], float]:
        """Seconds of each lap, and of all the time since the start that lies in none; waits for the last lap's end."""
        pairs = list(zip(self._marks, self._marks[1:], strict=False))
        if self._cuda:
            self._marks[-1].synchronize()
            laps = [before.elapsed_time(after) / 1000 for before, after in pairs]
        else:
            laps = [after - before for before, after in pairs]
        return laps, time.perf_counter() - self._started - sum(laps)

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event
