"""Lightning callbacks: checkpoints, progress, provenance, summary and throughput."""

from specauf.callbacks.checkpoints import Checkpoints
from specauf.callbacks.progress import TrainingProgress
from specauf.callbacks.provenance import SaveProvenance
from specauf.callbacks.summary import Summary
from specauf.callbacks.throughput import Throughput

__all__ = ["Checkpoints", "SaveProvenance", "Summary", "Throughput", "TrainingProgress"]
