"""Checkpoint directories on disk: written whole or not at all, and read tensor by tensor."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from specauf.drafters.files import CONFIG, WEIGHTS, read_json
from specauf.errors import UserError

CARD = "README.md"
DTYPES: dict[str, torch.dtype] = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory to fill that becomes `path` when the block ends, and vanishes when it raises.

    Raises:
        UserError: `path` exists, or its place cannot be written.
    """
    require_absent(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Beside its final place, because a rename does not cross file systems.
        draft = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): choose another directory") from error
    try:
        yield draft
        # Servers often run as another user; safetensors and mkdtemp give the owner alone the right to read.
        draft.chmod(0o755)
        for file in draft.iterdir():
            file.chmod(0o644)
        require_absent(path)
        draft.rename(path)
    except SafetensorError as error:  # reading has errors of its own
        raise UserError(f"{path} cannot be written ({error}): free some space or choose another directory") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def require_absent(path: Path) -> None:
    """Refuse to write over anything.

    Raises:
        UserError: something is there.
    """
    if path.exists() or path.is_symlink():
        raise UserError(f"{path} exists: exports never write over anything; choose another directory or move it away")


def read_config(directory: Path) -> dict[str, Any]:
    """A checkpoint directory's config.json.

    Raises:
        UserError: it is missing or is not a JSON object.
    """
    return read_json(directory / CONFIG)


def write_config(directory: Path, config: dict[str, Any]) -> None:
    """Write config.json."""
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


@contextmanager
def open_weights(directory: Path) -> Iterator["Weights"]:
    """The tensors of a checkpoint directory, in one file or sharded; each is read when asked for.

    Raises:
        UserError: a file is missing or damaged.
    """
    index = directory / f"{WEIGHTS}.index.json"
    listed = read_json(index).get("weight_map") if index.is_file() else None
    if listed is not None and not isinstance(listed, dict):
        raise UserError(f"{index}: weight_map is no mapping; download the drafter again")
    names = sorted(set(map(str, listed.values()))) if listed is not None else [WEIGHTS]
    files: dict[str, Any] = {}
    metadata: dict[str, str] = {}
    for name in names:
        path = directory / name
        if not path.is_file():
            raise UserError(f"{path}: missing; give a drafter's directory with {CONFIG} and {WEIGHTS}")
        try:
            file = safe_open(path, "pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: cannot be read ({error}); download the drafter again") from error
        metadata |= file.metadata() or {}
        files |= dict.fromkeys(file.keys(), file)
    yield Weights(files, metadata)


class Weights:
    """Named tensors of safetensors files, as stored.

    Args:
        files: open file of every tensor's name.
        metadata: of the files.
    """

    def __init__(self, files: dict[str, Any], metadata: dict[str, str]) -> None:
        self._files, self.metadata = files, metadata

    @property
    def names(self) -> list[str]:
        """Names, sorted."""
        return sorted(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape, read from the header alone."""
        return tuple(self._files[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Safetensors' name of the type (`BF16`, `F32`, ...), read from the header alone."""
        return str(self._files[name].get_slice(name).get_dtype())

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor


def common_dtype(tensors: dict[str, Tensor]) -> torch.dtype:
    """The narrowest type that holds every floating-point tensor without loss."""
    found = {t.dtype for t in tensors.values() if t.is_floating_point()}
    first, *rest = sorted(found, key=str) or [torch.float32]
    for dtype in rest:
        first = torch.promote_types(first, dtype)
    return first
