"""What a run was: resolved config, command line, versions, git commit and the cache it read."""

import json
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.cli import SaveConfigCallback

from specauf import __version__

_PACKAGES = ("lightning", "transformers", "zarr", "zarrs", "numcodecs", "jsonargparse", "torchmetrics")


class SaveProvenance(SaveConfigCallback):
    """Writes `config.yaml` and `run.json` into the run directory, whatever logs the run.

    Lightning's own would go to the first logger's directory, which may be the user's current one. So it must be made
    with `save_to_log_dir=False`.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Nothing yet: a run that is refused, and one that only validates, leave the files of its directory alone."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write everything, now that the checkpoint's own checks are behind us."""
        super().setup(trainer, pl_module, "fit")

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Runs on the first rank only, so it must not call anything collective."""
        directory = Path(trainer.default_root_dir)  # `log_dir` would be a collective call
        directory.mkdir(parents=True, exist_ok=True)  # not every logger makes it
        config = self.config.clone()
        config.ckpt_path = None  # a run that starts from this file is a new one
        self.parser.save(
            config,
            str(directory / self.config_filename),
            skip_none=False,
            overwrite=self.overwrite,
            multifile=self.multifile,
        )
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        record = {
            "argv": sys.argv,
            "stage": stage,
            "cache": str(datamodule.url),
            "cache_fingerprint": datamodule.cache.fingerprint,
            "seed": datamodule.seed,
            "versions": {"specauf": __version__, "python": platform.python_version(), **_versions()},
            "git": _git_commit(),
            "world_size": trainer.world_size,
        }
        (directory / "run.json").write_text(json.dumps(record, indent=2) + "\n")


def _versions() -> dict[str, str]:
    # torch's own says which build it is (+cu132), which PyPI's metadata leaves out.
    return {"torch": str(torch.__version__), **{name: metadata.version(name) for name in _PACKAGES}}


def _git_commit() -> str | None:
    """The commit of the checkout this package runs from; None outside one, and where there is no git.

    An environment inside another project's checkout is not ours: this file must be tracked there.
    """
    here = Path(__file__).resolve()
    git = ["git", "-C", str(here.parent)]
    try:
        tracked = subprocess.run([*git, "ls-files", "--error-unmatch", here.name], capture_output=True, check=False)
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return head.stdout.strip() if tracked.returncode == head.returncode == 0 else None
