"""Where and when figures were measured."""

import datetime
import os
import platform
from collections.abc import Sequence
from typing import Any

import torch

from specauf import __version__


def environment(device: torch.device | str) -> dict[str, Any]:
    """Today and this machine.

    Args:
        device: what the figures were measured on.
    """
    device = torch.device(device)
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "specauf": __version__,
    }


def united(environments: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One for several: what differs is named after one another, in order."""
    fields = dict.fromkeys(field for found in environments for field in found)
    values = {field: dict.fromkeys(found[field] for found in environments if field in found) for field in fields}
    return {field: next(iter(v)) if len(v) == 1 else " and ".join(map(str, v)) for field, v in values.items()}
