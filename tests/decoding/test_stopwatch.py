"""Laps by the clock of whatever does the work."""

import time

import pytest
import torch

from specauf.decoding.stopwatch import Stopwatch


def test_laps_and_the_rest_are_all_the_time_there_was():
    before = time.perf_counter()
    watch = Stopwatch(torch.device("cpu"))
    watch.lap()
    watch.lap()
    laps, rest = watch.read()
    assert len(laps) == 2
    assert min(*laps, rest) >= 0
    assert sum(laps) + rest <= time.perf_counter() - before


def test_a_gpu_is_waited_for_once_and_its_own_times_count(monkeypatch):
    moments, waited = iter([0.0, 40.0, 65.0]), []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: object) -> None:
            self.milliseconds = next(moments)

        def synchronize(self) -> None:
            waited.append(self.milliseconds)

        def elapsed_time(self, other: "Event") -> float:
            return other.milliseconds - self.milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: device)
    watch = Stopwatch(torch.device("cuda"))
    watch.lap()
    watch.lap()
    laps, rest = watch.read()
    assert laps == pytest.approx([0.04, 0.025])
    assert waited == [65.0]
    assert rest < 0  # these moments are made up, the machine's own clock is not
