"""Where and when figures were measured."""

import datetime
import os
import platform
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
