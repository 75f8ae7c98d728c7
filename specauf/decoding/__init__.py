"""Speculative decoding, and its replay on cached answers."""

from specauf.decoding.replay import Replay, replay
from specauf.decoding.result import Cycle, DecodeResult
from specauf.decoding.speculative import speculative_generate, speculative_generate_batch, speculative_stream

__all__ = [
    "Cycle",
    "DecodeResult",
    "Replay",
    "replay",
    "speculative_generate",
    "speculative_generate_batch",
    "speculative_stream",
]
