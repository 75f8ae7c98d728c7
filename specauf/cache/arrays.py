"""Decoding Zarr arrays through the zarrs codec pipeline, or through zarr-python's own where that cannot run."""

import functools
import os
import warnings
from pathlib import Path

import numpy as np
import zarr
from zarr.storage import LocalStore


def read_array(folder: Path, name: str) -> np.ndarray:
    """One array of a Zarr group on local disk, whole."""
    with zarr.config.set({"codec_pipeline.path": _codec_pipeline()}):
        array = zarr.open_array(LocalStore(folder, read_only=True), path=name, mode="r")
        return np.asarray(array[...])


_PLAIN = "zarr.core.codec_pipeline.BatchedCodecPipeline"
_zarrs_process: int | None = None


def _codec_pipeline() -> str:
    """The zarrs pipeline, or zarr-python's own where zarrs is missing or cannot run."""
    global _zarrs_process
    if not _has_zarrs():
        return _PLAIN
    _zarrs_process = _zarrs_process or os.getpid()
    # zarrs' threads do not survive a fork: a forked reader would wait for them for ever.
    return "zarrs.ZarrsCodecPipeline" if _zarrs_process == os.getpid() else _PLAIN


@functools.cache
def _has_zarrs() -> bool:
    try:
        import zarrs  # noqa: F401
    except ImportError:
        warnings.warn("zarrs is not installed: shards are read through plain zarr-python, slower", stacklevel=2)
        return False
    return True
