"""Lightning callbacks: progress, throughput and provenance."""

from specauf.callbacks.checkpoints import Checkpoints
from specauf.callbacks.progress import TrainingProgress
from specauf.callbacks.provenance import SaveProvenance
from specauf.callbacks.throughput import Throughput

__all__ = ["Checkpoints", "SaveProvenance", "Throughput", "TrainingProgress"]
