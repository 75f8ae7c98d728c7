"""What a rank computes on; without Lightning, whose import takes longer than a small estimate."""

import os

import torch

from cache_builder.config import BuildConfig
from specauf.errors import UserError


def share_cores(config: BuildConfig) -> None:
    """Give this rank its share: ranks that each start a thread per core spend their time waiting for each other."""
    if config.devices * config.num_nodes > 1 and config.accelerator != "gpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // config.devices))


def device_of(config: BuildConfig) -> torch.device:
    """Where this rank's target goes."""
    if config.accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError("accelerator is gpu, but no CUDA device is there: use --accelerator=cpu")
    if config.accelerator == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
    return torch.device("cuda", local)
