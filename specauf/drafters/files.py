"""Checkpoint directories of drafters: `config.json` and `model.safetensors`, read strictly."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from specauf.drafters.config import DrafterConfig, DtypeName
from specauf.errors import UserError

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_DTYPES: dict[torch.dtype, DtypeName] = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


def write_zlab(directory: Path, config: DrafterConfig, weights: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Write a drafter as z-lab's loader, SGLang and vLLM read it.

    Raises:
        UserError: a weight is not finite, or the type is not one that servers load.
    """
    if dtype not in _DTYPES:
        raise UserError(f"dtype: {dtype} found, one of {', '.join(_DTYPES.values())} expected")
    stored = {name: value.detach().to("cpu", dtype).contiguous() for name, value in weights.items()}
    broken = [name for name, value in stored.items() if not torch.isfinite(value).all()]
    if broken:
        raise UserError(
            f"{broken[0]}: holds numbers that are not finite in {_DTYPES[dtype]}; the drafter is broken, do not ship it"
        )
    directory.mkdir(parents=True, exist_ok=True)
    save_file(stored, directory / WEIGHTS, metadata={"format": "pt"})
    (directory / CONFIG).write_text(json.dumps(config.to_zlab(_DTYPES[dtype]), indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a checkpoint directory.

    Raises:
        UserError: the file is missing or is not a JSON object.
    """
    if not path.is_file():
        raise UserError(f"{path}: missing; give a drafter's directory with {CONFIG} and {WEIGHTS}")
    try:
        raw = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not JSON ({error}); download the drafter again") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path}: a JSON {type(raw).__name__} found, an object expected; download the drafter again")
    return raw


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
    with ExitStack() as stack:
        for name in names:
            path = directory / name
            if not path.is_file():
                raise UserError(f"{path}: missing; give a drafter's directory with {CONFIG} and {WEIGHTS}")
            try:
                file = stack.enter_context(safe_open(path, "pt"))
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


def read_weights(directory: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint directory, in fp32 (integers and booleans as they are).

    Raises:
        UserError: a file is missing or damaged.
    """
    with open_weights(directory) as weights:
        found = {name: weights[name] for name in weights.names}
    return {k: v.float() if v.is_floating_point() else v for k, v in found.items()}


def read_zlab(
    directory: Path, config_class: type[DrafterConfig] = DrafterConfig
) -> tuple[DrafterConfig, dict[str, Tensor]]:
    """Config and weights of a z-lab directory.

    Raises:
        UserError: it is not one.
    """
    return config_class.from_zlab(read_json(directory / CONFIG)), read_weights(directory)


def check_weights(directory: Path, drafter: nn.Module, weights: dict[str, Tensor]) -> None:
    """Refuse a missing, unknown or misshapen tensor: a server would skip it and run random layers.

    Raises:
        UserError: naming the first such tensor.
    """
    wanted = drafter.state_dict()
    for name in sorted(wanted.keys() | weights.keys()):
        if name not in weights:
            raise UserError(f"{directory}: tensor {name} missing; it is not a whole drafter of this kind")
        if name not in wanted:
            raise UserError(f"{directory}: tensor {name} unknown; it is not a drafter of this kind")
        if weights[name].shape != wanted[name].shape:
            found, expected = tuple(weights[name].shape), tuple(wanted[name].shape)
            raise UserError(f"{directory}: tensor {name} has shape {found}, {expected} expected from its {CONFIG}")
