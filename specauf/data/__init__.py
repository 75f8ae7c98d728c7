"""From cached documents to batches of blocks."""

from specauf.data.batch import BlockBatch, BlockTargets

__all__ = ["BlockBatch", "BlockTargets"]
