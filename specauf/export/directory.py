"""Checkpoint directories on disk: written whole or not at all, and read tensor by tensor."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from specauf.drafters.files import CONFIG, read_json
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


def common_dtype(tensors: dict[str, Tensor]) -> torch.dtype:
    """The narrowest type that holds every floating-point tensor without loss."""
    found = {t.dtype for t in tensors.values() if t.is_floating_point()}
    first, *rest = sorted(found, key=str) or [torch.float32]
    for dtype in rest:
        first = torch.promote_types(first, dtype)
    return first
