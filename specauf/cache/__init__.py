"""The cache on disk: format, reading and checking. Nothing here imports model code."""

from specauf.cache.features import FeatureCodec, fold_sketch
from specauf.cache.integrity import verify
from specauf.cache.reader import Cache, open_cache
from specauf.cache.schema import FORMAT_VERSION, CommitRecord, Counts, Identity, Manifest
from specauf.cache.shard import Document

__all__ = [
    "FORMAT_VERSION",
    "Cache",
    "CommitRecord",
    "Counts",
    "Document",
    "FeatureCodec",
    "Identity",
    "Manifest",
    "fold_sketch",
    "open_cache",
    "verify",
]
