"""torchmetrics of speculative decoding: what a cycle emits, per slot and overall, and what a loss looked at."""

from specauf.metrics.emitted import AcceptedLength, EmittedLength, SlotAcceptance, accepted_lengths
from specauf.metrics.support import AcceptanceProbability, SupportRatio, TokenAccuracy

__all__ = [
    "AcceptanceProbability",
    "AcceptedLength",
    "EmittedLength",
    "SlotAcceptance",
    "SupportRatio",
    "TokenAccuracy",
    "accepted_lengths",
]
