"""`specauf fit` and `specauf validate`: LightningCLI, with one-line errors and a run directory of its own."""

import logging
import re
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from specauf.callbacks import Checkpoints, SaveProvenance, Summary, Throughput, TrainingProgress, WholeValidations
from specauf.checkpoint import load_checkpoint
from specauf.checkpoint_io import WholeCheckpointIO
from specauf.ckpt_path import after_restart, checkpoint_file
from specauf.command import one_line
from specauf.data.module import CacheDataModule
from specauf.errors import UserError
from specauf.loggers import MetricsLog
from specauf.module import DrafterModule
from specauf.run_directory import (
    new_run_directory,
    refuse_second_run,
    remove_empty,
    require_local,
    require_writable,
)
from specauf.training_errors import check_length, check_trainer, one_line_errors, one_line_signals


class OneLineParser(LightningArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise instead of printing usage and exiting."""
        raise UserError(one_line(message))


class TrainingCLI(LightningCLI):
    """LightningCLI for drafters: each run has a directory with its config, provenance, logs and checkpoints."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Only what drafters are for."""
        keep = ("fit", "validate")
        return {name: args for name, args in LightningCLI.subcommands().items() if name in keep}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Every run keeps checkpoints; how often is `--checkpoints.every_n_steps`."""
        parser.add_lightning_class_args(Checkpoints, "checkpoints")

    def _set_seed(self) -> None:
        """Refuse what numpy's generators do not take; Lightning's own message names no option."""
        seed = self.config.get(self.subcommand, self.config).get("seed_everything")
        if seed is not None and not isinstance(seed, bool) and not 0 <= seed < 2**32:
            raise UserError(f"seed_everything is {seed}: give a number from 0 to {2**32 - 1}")
        super()._set_seed()

    def before_instantiate_classes(self) -> None:
        """Name the run directory and refuse to mix two runs in it."""
        config = self.config[self.subcommand]
        if config.trainer.max_steps == 0 or config.trainer.max_epochs == 0:
            raise UserError("trainer.max_steps or max_epochs is 0: give at least 1, or -1 for no limit")
        if self.subcommand == "validate" and config.trainer.limit_val_batches == 0:
            raise UserError("trainer.limit_val_batches is 0, which validates nothing: give 1.0 for all batches")
        if self.subcommand == "fit" and config.trainer.fast_dev_run and config.ckpt_path:
            raise UserError(
                f"trainer.fast_dev_run is {config.trainer.fast_dev_run} with --ckpt_path={config.ckpt_path}: it tries "
                "the first batches of a new run, so leave one of them out"
            )
        config.trainer.use_distributed_sampler = False  # every rank draws its own slice; Lightning would cut it again
        if config.trainer.default_root_dir is None:
            config.trainer.default_root_dir = new_run_directory()
        root, own, given = config.trainer.default_root_dir, config.checkpoints.directory, config.ckpt_path
        require_local(root, own)
        root = Path(root)
        own = root / "checkpoints" if own is None else Path(own)
        if given and str(given).endswith(".ckpt"):
            load_checkpoint(Path(given))  # for its errors; Lightning's are tracebacks
        elif self.subcommand == "validate" and _nothing_trained(config):
            raise UserError("validate: no weights given: add --ckpt_path=RUN/checkpoints/best.ckpt")
        require_writable(root)
        # A run that came to no checkpoint has nothing to lose, and may be started again in its place.
        if self.subcommand == "fit":
            # What SLURM's signal has left in the run directory is its own, whatever it is called.
            refuse_second_run(root, own, resumed=own / "hpc" if given == "hpc" else Path(given) if given else None)

    def _parse_ckpt_path(self) -> None:
        """Find the file; no more, for Lightning would let its hyperparameters override flags and files, silently."""
        config = self.config[self.config.subcommand]
        if config.ckpt_path and not any(word.startswith("--ckpt_path") for word in sys.argv):
            raise UserError(
                f"ckpt_path is {config.ckpt_path} in a file: give it as --ckpt_path={config.ckpt_path}, or "
                "--ckpt_path=null for none"
            )
        root, own = config.trainer.default_root_dir, config.checkpoints.directory
        folder = Path(own) if own is not None else None if root is None else Path(root) / "checkpoints"
        if config.ckpt_path:
            config.ckpt_path = checkpoint_file(str(config.ckpt_path), folder, fit=self.config.subcommand == "fit")
        elif self.config.subcommand == "fit":
            config.ckpt_path = after_restart(folder)

    def instantiate_classes(self) -> None:
        """Instantiate everything; a class that lacks its package says which one, and nothing else.

        Raises:
            UserError: a package is missing.
        """
        try:
            super().instantiate_classes()
        except ValueError as error:
            lacking = re.search(r"Requirement '[^\n]*", str(error))
            if lacking is None:
                raise
            raise UserError(lacking[0]) from error
        if self.subcommand == "fit":
            check_length(self.trainer, self.model)

    def fit(self, **kwargs: Any) -> None:
        """Train; LightningCLI calls this instead of the trainer's own."""
        with one_line_signals(self.trainer):
            self.trainer.fit(**kwargs)

    def validate(self, **kwargs: Any) -> None:
        """Validate, likewise."""
        with one_line_signals(self.trainer):
            self.trainer.validate(**kwargs)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Add the loggers and callbacks every run has, unless the config chose its own."""
        config = self.config_init[self.subcommand].trainer
        root = config.default_root_dir
        if self.subcommand == "validate":
            kwargs["logger"] = False if config.logger in (None, True) else config.logger  # a run's logs are its own
        elif config.logger in (None, True) and not config.fast_dev_run:
            kwargs["logger"] = [MetricsLog(Path(root)), TensorBoardLogger(root, name="", version="logs")]
        elif config.logger and not config.fast_dev_run:
            kwargs["logger"] = [MetricsLog(Path(root)), *_other_loggers(config.logger, Path(root))]
        given = config.callbacks or []
        own: list[Callback] = [given] if isinstance(given, Callback) else list(given)
        check_trainer(config, own)
        defaults: list[Callback] = [Throughput()]
        if config.enable_progress_bar is not False and not any(isinstance(callback, ProgressBar) for callback in own):
            defaults.append(TrainingProgress())
        if self.subcommand == "fit":
            # The first of them: it gives the others the run's length back.
            defaults = [WholeValidations(), *defaults, *([] if config.fast_dev_run else [Summary()])]
        kinds = tuple(type(c) for c in own)
        kwargs["callbacks"] = own + [c for c in defaults if not isinstance(c, kinds)]
        plugins = config.plugins if isinstance(config.plugins, list) else [config.plugins] if config.plugins else []
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, WholeCheckpointIO()]
        _require_whole_drafter(config.strategy)
        _require_fp32_weights(config.precision)
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (ValueError, TypeError, ImportError, MisconfigurationException) as error:  # of its settings
            hint = "; --trainer.accelerator=cpu runs everywhere" if "backend found" in str(error) else ""
            raise UserError(f"trainer: {' '.join(str(error).split())}{hint}") from error
        _require_fp32_weights(trainer.precision)  # a plugin's
        if trainer.precision == "bf16-mixed" and str(config.precision) in ("16", "16-mixed"):
            raise UserError("trainer.precision is 16-mixed, which CPUs do not have: give bf16-mixed or 32-true")
        return trainer


def main(argv: list[str]) -> None:
    """Run `fit` or `validate`; `argv` starts with the command.

    Raises:
        UserError: an argument, the cache or the configuration is wrong.
    """
    _quiet()
    sys.argv = [sys.argv[0], *files_first(argv)]
    try:
        with one_line_errors():
            TrainingCLI(
                DrafterModule,
                CacheDataModule,
                save_config_callback=SaveProvenance,
                save_config_kwargs={"overwrite": True, "save_to_log_dir": False},
                seed_everything_default=0,
                parser_class=OneLineParser,
                auto_configure_optimizers=False,
            )
    finally:
        remove_empty()


def files_first(argv: list[str]) -> list[str]:
    """Move `-c FILE` before all other options, in their order: what a flag says wins, wherever it stands."""
    files: list[str] = []
    others: list[str] = []
    for i, word in enumerate(argv[1:], start=1):
        named = word.partition("=")[0] in ("-c", "--config") or (argv[i - 1] in ("-c", "--config"))
        (files if named else others).append(word)
    return [argv[0], *files, *others]


def _nothing_trained(config: Any) -> bool:
    return not config.ckpt_path and not (config.model.drafter.init_args or {}).get("init")


def _other_loggers(given: Logger | Iterable[Logger], root: Path) -> list[Logger]:
    """The loggers that a config names, beside the run's own `metrics.csv`.

    Raises:
        UserError: one would write that file.
    """
    loggers = [given] if isinstance(given, Logger) else list(given)
    for logger in loggers:
        if isinstance(logger, CSVLogger) and Path(logger.log_dir).resolve() == root.resolve():
            raise UserError(f"trainer.logger: CSVLogger in {root}, where every run writes metrics.csv: leave it out")
    return loggers


def _require_whole_drafter(strategy: Any) -> None:
    """Refuse strategies that cut the drafter into pieces: they copy batches field by field, and clip no norm.

    Raises:
        UserError: the strategy is one of these.
    """
    name = strategy if isinstance(strategy, str) else type(strategy).__name__
    if name.lower().startswith(("fsdp", "deepspeed", "modelparallel")):
        raise UserError(f"trainer.strategy is {name}, which cuts the drafter into pieces: give ddp, it fits one device")


def _require_fp32_weights(precision: Any) -> None:
    """Refuse precisions that cast weights and batches: the loss and the optimizer's small steps need fp32.

    Raises:
        UserError: the precision is not one that keeps fp32 weights.
    """
    if precision is not None and str(precision) not in _FP32_WEIGHTS:
        raise UserError(
            f"trainer.precision is {precision}: give bf16-mixed, 16-mixed or 32-true, under which the weights stay fp32"
        )


_FP32_WEIGHTS = ("32", "32-true", "16", "16-mixed", "bf16", "bf16-mixed")


def _quiet() -> None:
    """Leave the terminal to what the user must read."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",  # one process reads faster than the drafter trains
        ".*Checkpoint directory .* exists and is not empty.*",  # so it does when a run is resumed
        ".*isinstance\\(treespec, LeafSpec\\).*",  # Lightning's own
        ".*WeightAveraging callback with a model that overrides.*",  # the drafter is whole on every rank
        ".*WeightAveraging callback, but loading a checkpoint outside the 'fit' stage.*",  # the average is validated
        ".*dirpath has changed from.*",  # a run that goes on in another directory keeps its own best there
        ".*smaller than the logging interval.*",
        # For validate, and for a run that validates where it did not before.
        ".*Please add the following callbacks: \\[(['\"](Summary|WholeValidations|Checkpoints{[^}]*})['\"](, )?)+\\].*",
        ".*Mismatch dtype between input and weight.*",  # mixed precision: so it is meant
        ".*Detected call of `lr_scheduler.step.*",  # a gradient scaler has left the first steps out
        ".*AMP with fp16 is not supported on CPU.*",  # refused, where Lightning would take bf16
        ".*Experiment logs directory .* exists and is not empty.*",  # what it would delete was moved aside
    ):
        warnings.filterwarnings("ignore", message=message)
