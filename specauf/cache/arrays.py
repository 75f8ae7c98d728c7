"""Decoding Zarr arrays: what our own writer lays out directly, anything else through zarrs or zarr-python."""

import functools
import json
import math
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import zarr
from numcodecs import blosc
from zarr.storage import LocalStore


def read_array(folder: Path, name: str) -> np.ndarray:
    """One array of a Zarr group on local disk, whole."""
    with zarr.config.set({"codec_pipeline.path": codec_pipeline()}):
        array = zarr.open_array(LocalStore(folder, read_only=True), path=name, mode="r")
        return np.asarray(array[...])


def decode_object(metadata: bytes | memoryview, data: bytes | memoryview) -> np.ndarray | None:
    """An array whose bytes are at hand, when it is laid out as the builder writes it.

    That is one object: a shard of whole rows, in chunks that are Blosc's or plain, and its index at the end. Going
    through Zarr for each of a shard's dozen small arrays costs more than decoding them does.

    Args:
        metadata: the array's `zarr.json`.
        data: its only object, already compared with its digest.

    Returns:
        The array; None when it is laid out in another way, which Zarr then reads.
    """
    meta = json.loads(bytes(metadata))
    shape, outer = meta["shape"], meta["chunk_grid"]["configuration"]["chunk_shape"]
    codec = meta["codecs"][0]
    if len(meta["codecs"]) != 1 or codec["name"] != "sharding_indexed" or outer[0] < shape[0]:
        return None
    sharding = codec["configuration"]
    chunk, dtype = sharding["chunk_shape"], np.dtype(meta["data_type"])
    inner, index = ([c["name"] for c in sharding[names]] for names in ("codecs", "index_codecs"))
    if (
        inner not in (["bytes", "blosc"], ["bytes"])
        or index != ["bytes", "crc32c"]
        or sharding["index_location"] != "end"
    ):
        return None
    if (
        chunk[1:] != shape[1:]
        or outer[1:] != shape[1:]
        or sharding["codecs"][0] != _LITTLE.get(dtype.itemsize, _LITTLE[2])
    ):
        return None
    count, size = outer[0] // chunk[0], math.prod(chunk) * dtype.itemsize
    places = np.frombuffer(data[-16 * count - 4 : -4], "<u8").reshape(count, 2)
    if (places[:, 0] == 2**64 - 1).any():
        return None
    out = (_plain if inner == ["bytes"] else _decompress)(data, places, size)
    return out.reshape(-1).view(dtype.newbyteorder("<")).reshape(-1, *shape[1:])[: shape[0]]


def _plain(data: bytes | memoryview, places: np.ndarray, size: int) -> np.ndarray:
    """Chunks that are not compressed; no copy when they lie in order, as the builder writes them."""
    source, starts = np.frombuffer(data, np.uint8), places[:, 0].astype(np.int64)
    if (starts == starts[0] + size * np.arange(len(starts))).all():
        return source[starts[0] : starts[0] + size * len(starts)]
    return np.concatenate([source[start : start + size] for start in starts])


def _decompress(data: bytes | memoryview, places: np.ndarray, size: int) -> np.ndarray:
    """Blosc chunks, several at once when that is worth it."""
    out, source = np.empty((len(places), size), np.uint8), memoryview(data)
    chunks = [source[offset : offset + length] for offset, length in places.tolist()]
    if out.nbytes < _WORTH_THREADS:
        for chunk, row in zip(chunks, out, strict=True):
            blosc.decompress(chunk, row)
    else:
        list(_threads().map(blosc.decompress, chunks, out))
    return out


_WORTH_THREADS = 4 << 20  # bytes
_pool: tuple[int, ThreadPoolExecutor] | None = None


def _threads() -> ThreadPoolExecutor:
    """Threads that decompress; a forked process starts its own, for threads do not survive a fork."""
    global _pool
    if _pool is None or _pool[0] != os.getpid():
        _pool = os.getpid(), ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="specauf-decode")
    return _pool[1]


_LITTLE = {1: {"name": "bytes"}, 2: {"name": "bytes", "configuration": {"endian": "little"}}}
_PLAIN = "zarr.core.codec_pipeline.BatchedCodecPipeline"
_zarrs_process: int | None = None


def codec_pipeline() -> str:
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
