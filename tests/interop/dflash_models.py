"""Read in the environment `dflash` by its scripts: z-lab's drafter of a directory."""

import json
from pathlib import Path

import dflash.model
import torch


def load(directory: str):
    """The class that the config names, in fp32; nothing may be missing or left over."""
    name = json.loads((Path(directory) / "config.json").read_text())["architectures"][0]
    drafter, info = getattr(dflash.model, name).from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    return drafter.eval()
