"""How checkpoints reach the disk: whole or not at all, whatever ends the process and wherever `TMPDIR` is."""

import io
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from specauf.cache.location import TEMPORARY, write_atomically


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes beside the checkpoint and renames.

    Lightning's own writes into `TMPDIR` and moves, which across file systems is a copy over the checkpoint that was
    there: a kill or a full disk in the midst of it leaves neither of the two.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Replace the file.

        Args:
            checkpoint: anything that `torch.save` takes.
            path: of the file, on this machine; its directory is made.
            storage_options: none are known.

        Raises:
            TypeError: storage options are given.
            OSError: the disk is full, or the like; the file is as it was.
        """
        if storage_options is not None:
            raise TypeError(f"storage_options: {storage_options} found, None expected")
        path = Path(path)
        for killed in path.parent.glob(f"{path.name}{TEMPORARY}*"):
            killed.unlink(missing_ok=True)
        data = io.BytesIO()  # torch.save into a file hides why the file could not be written
        torch.save(checkpoint, data)
        write_atomically(path, data.getbuffer())
