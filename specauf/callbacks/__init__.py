"""Lightning callbacks: checkpoints, progress, provenance, summary, throughput and validations."""

from specauf.callbacks.checkpoints import Checkpoints
from specauf.callbacks.progress import TrainingProgress
from specauf.callbacks.provenance import SaveProvenance
from specauf.callbacks.summary import Summary
from specauf.callbacks.throughput import Throughput
from specauf.callbacks.validations import WholeValidations

__all__ = ["Checkpoints", "SaveProvenance", "Summary", "Throughput", "TrainingProgress", "WholeValidations"]
