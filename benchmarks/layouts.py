"""Ways to keep documents on disk and to read them shuffled, for `benchmarks.read`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from specauf.cache import Cache, FeatureCodec, open_cache
from specauf.cache.features import decode_bf16

Arrays = dict[str, np.ndarray]


class Layout(Protocol):
    """Documents on disk.

    Attributes:
        folder: holds all of its files.
    """

    folder: Path

    def open(self) -> None:
        """Open or map the files."""

    def close(self) -> None:
        """Let go of them, so that the system can forget them."""

    def read(self, seed: int) -> int:
        """Read all documents in a shuffled order; how many numbers they are."""


def finished(a: Arrays, codec: FeatureCodec) -> int:
    """The training loop's arrays of a rival's document; returns how many numbers they are."""
    out = [a["tokens"].astype(np.int64), a["mask"], a["rows"].astype(np.int64), a["ids"].astype(np.int64)]
    out.append(a["logprobs"].astype(np.float32))
    if "codes" in a:
        codes, scale = a["codes"], a.get("scale")
        if codec.kind == "sketch":
            assert scale is not None
            out.append(codes * scale.astype(np.float32)[:, None])
        else:
            out.append(decode_bf16(codes) if codec.kind == "bf16" else codec.decode(codes, scale))
    if "features" in a:
        out.append(torch.from_numpy(a["features"]).view(torch.bfloat16).float().numpy())
    if "bits" in a:
        out.append(a["bits"])
    return sum(x.size for x in out)


class Ours:
    """This project's cache, read as training reads it.

    Args:
        url: of the cache, on this machine.
    """

    def __init__(self, url: str) -> None:
        self.folder = Path(url)
        self.open()

    def open(self) -> None:
        """Open the cache."""
        self.cache: Cache = open_cache(str(self.folder))

    def close(self) -> None:
        """Let go of its files."""
        del self.cache

    def read(self, seed: int) -> int:
        """All documents; the seed is an epoch."""
        size = 0
        for d in self.cache.documents(shuffle=True, epoch=seed):
            assert d.topk_ids is not None
            assert d.topk_logprobs is not None
            out = [d.tokens, d.loss_mask, d.row_index, d.topk_ids, d.topk_logprobs, d.training_features]
            size += sum(x.size for x in out if x is not None)
        return size


class Files:
    """One file a document.

    Args:
        folder: where the files go.
        documents: their arrays.
        codec: of the features.
        save: writes a document's arrays to a file.
        load: reads them.
    """

    def __init__(
        self,
        folder: Path,
        documents: list[Arrays],
        codec: FeatureCodec,
        save: Callable[[Arrays, Path], object] = save_file,
        load: Callable[[Path], Arrays] = load_file,
    ) -> None:
        self.folder, self.count, self.codec, self.load = folder, len(documents), codec, load
        folder.mkdir()
        for number, a in enumerate(documents):
            save(a, folder / str(number))

    def open(self) -> None:
        """Nothing: each file is opened when it is read."""

    def close(self) -> None:
        """Nothing."""

    def read(self, seed: int) -> int:
        """All documents."""
        order = np.random.default_rng(seed).permutation(self.count)
        return sum(finished(self.load(self.folder / str(n)), self.codec) for n in order)


def save_pickle(a: Arrays, file: Path) -> None:
    """By torch.save."""
    torch.save({name: torch.from_numpy(value.copy()) for name, value in a.items()}, file)


def load_pickle(file: Path) -> Arrays:
    """By torch.load, mapped: nothing is copied twice."""
    return {name: value.numpy() for name, value in torch.load(file, weights_only=True, mmap=True).items()}


class ArrowTable:
    """One Arrow table through `datasets`, a row a document; arrays flat, their widths in memory.

    Args:
        folder: where it goes.
        documents: their arrays.
        codec: of the features.
    """

    def __init__(self, folder: Path, documents: list[Arrays], codec: FeatureCodec) -> None:
        from datasets import Dataset, Features, List, Value, disable_progress_bars

        disable_progress_bars()
        kinds = Features({name: List(Value(str(value.dtype))) for name, value in documents[0].items()})
        rows = [{name: value.reshape(-1) for name, value in a.items()} for a in documents]
        Dataset.from_list(rows, kinds).save_to_disk(str(folder))
        self.folder, self.count, self.codec = folder, len(documents), codec
        self.widths = {name: value.shape[1:] for name, value in documents[0].items()}
        self.open()

    def open(self) -> None:
        """Map the table."""
        from datasets import load_from_disk

        self.table: Any = load_from_disk(str(self.folder)).with_format("numpy")

    def close(self) -> None:
        """Unmap it."""
        del self.table

    def read(self, seed: int) -> int:
        """All documents."""
        size = 0
        for n in np.random.default_rng(seed).permutation(self.count):
            row = self.table[int(n)]
            size += finished({name: row[name].reshape(-1, *width) for name, width in self.widths.items()}, self.codec)
        return size


class Flat:
    """All documents end to end, one flat file for each array, mapped; offsets in memory.

    Args:
        folder: where the files go.
        documents: their arrays.
        codec: of the features.
    """

    def __init__(self, folder: Path, documents: list[Arrays], codec: FeatureCodec) -> None:
        folder.mkdir()
        self.folder, self.count, self.codec = folder, len(documents), codec
        self.kinds, self.offsets = {}, {}
        for name in documents[0]:
            whole = np.concatenate([d[name] for d in documents])
            whole.tofile(folder / name)
            self.kinds[name] = (whole.dtype, whole.shape)
            self.offsets[name] = np.concatenate([[0], np.cumsum([len(d[name]) for d in documents])])
        self.open()

    def open(self) -> None:
        """Map the files."""
        self.arrays = {
            name: np.memmap(self.folder / name, dtype, "r", shape=shape) for name, (dtype, shape) in self.kinds.items()
        }

    def close(self) -> None:
        """Unmap them."""
        del self.arrays

    def read(self, seed: int) -> int:
        """All documents."""
        at = self.offsets
        return sum(
            finished({k: v[at[k][n] : at[k][n + 1]] for k, v in self.arrays.items()}, self.codec)
            for n in np.random.default_rng(seed).permutation(self.count)
        )
