"""Checkpoint directories of drafters: `config.json` and `model.safetensors`, read strictly."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
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


def read_weights(directory: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint directory, in one file or sharded, in fp32 (integers and booleans as they are).

    Raises:
        UserError: a file is missing or damaged.
    """
    index = directory / f"{WEIGHTS}.index.json"
    names = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else [WEIGHTS]
    weights: dict[str, Tensor] = {}
    for name in names:
        if not (directory / name).is_file():
            raise UserError(f"{directory / name}: missing; give a drafter's directory with {CONFIG} and {WEIGHTS}")
        try:
            weights |= load_file(directory / name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{directory / name}: cannot be read ({error}); download the drafter again") from error
    return {k: v.float() if v.is_floating_point() else v for k, v in weights.items()}


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
