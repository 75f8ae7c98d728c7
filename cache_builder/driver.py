"""Running a build on one or many ranks: Lightning's `Trainer.predict`, each item a whole shard."""

import contextlib
import datetime
import io
import logging
import signal
import sys
import time
import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
import torch.distributed
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch.utils.data import DataLoader

from cache_builder.builder import Build, open_build
from cache_builder.config import BuildConfig
from cache_builder.devices import device_of, share_cores
from cache_builder.documents import Advance
from cache_builder.lock import BuildLock, LockLostError, RankLock
from cache_builder.shard_writer import ShardWriter
from cache_builder.writer import load_codec
from specauf.cache.features import FeatureCodec
from specauf.cache.location import Location
from specauf.cache.reader import TARGET
from specauf.cache.schema import Manifest
from specauf.errors import TerminatedError, UserError, status_of
from specauf.progress import Advance as Show
from specauf.progress import progress
from specauf.sigterm import Sigterm

# Ranks that are done wait for the slowest one, which may be whole shards behind.
PATIENCE = datetime.timedelta(days=7)


def build(config: BuildConfig, again: Collection[str] = ()) -> Manifest | None:
    """Build a cache, or finish one that was begun.

    Args:
        config: of the build.
        again: names of damaged parts of a cache that is there, to be made again: shards, `target`, `manifest.json`.

    Returns:
        The manifest; None on ranks other than the first.

    Raises:
        UserError: anything that a user can put right.
        KeyboardInterrupt: the build was interrupted or terminated; what is committed stays. SystemExit on ranks other
            than the first.
    """
    first = rank_zero_only.rank == 0  # type: ignore[attr-defined]
    world = config.devices * config.num_nodes
    place = Location(config.out)
    share_cores(config)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_quiet_end(speaks=first))
        stack.enter_context(_no_empty_directory(place) if first else contextlib.nullcontext())
        lock = stack.enter_context(BuildLock(place)) if first else None
        # All ranks read the corpus and load the target; what they would say of it is said once.
        with contextlib.nullcontext() if first else contextlib.redirect_stderr(io.StringIO()):
            work = open_build(config, device=device_of(config))
        if lock is None:
            _run(work, _advance(_silent, world), None)
            return None
        work.claim(again)
        documents, missing = len(work.plan.numbers), work.missing()
        if missing:
            _say_of_the_corpus(work)
        left = _documents(work, missing)
        show = stack.enter_context(
            progress("build", float(documents), unit="documents", initial=float(documents - left))
        )
        if work.prepare(_advance(show, 1, lock), again=TARGET in again):
            missing = work.missing()
        # The last shards seldom come out even: what this rank does stands for all that is left.
        share = _documents(work, missing) / max(1, _documents(work, missing[::world]))
        _run(work, _advance(show, share), _First(missing, lock))
        lock.confirm()
        return work.finish()


@contextlib.contextmanager
def _no_empty_directory(place: Location) -> Iterator[None]:
    """A build that ends before its first file leaves no directory that it has made."""
    folder = None if place.local is None or place.local.exists() else place.local
    try:
        yield
    finally:
        if folder is not None:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()


def _documents(work: Build, shards: Sequence[int]) -> int:
    """How many are planned for some shards."""
    return sum(len(work.plan.shard(n)) for n in shards)


def _say_of_the_corpus(work: Build) -> None:
    """What was passed over, and whether nothing is held out.

    Before the target has answered anything, for what to do about it is to build anew.
    """
    if work.plan.corpus.note:
        print(f"note: {work.plan.corpus.note}", file=sys.stderr)
    share, count = work.config.held_out, len(work.plan.numbers)
    if share and not work.plan.held_out.any():
        print(
            f"note: none of {count} documents is held out to validate on (held_out is {share}): raise --held_out, or "
            "train with --data.validate_on=train",
            file=sys.stderr,
        )


@contextlib.contextmanager
def _quiet_end(*, speaks: bool) -> Iterator[None]:
    """When all ranks are interrupted, only the first says how to go on."""
    try:
        yield
    except KeyboardInterrupt as stopped:
        if speaks:
            raise
        raise SystemExit(status_of(stopped)) from stopped


@dataclass(frozen=True)
class _First:
    """What only the first rank knows: the missing shards, and that it holds the lock."""

    missing: list[int]
    lock: BuildLock


def _run(work: Build, advance: Advance, first: _First | None) -> None:
    """Build all missing shards under Lightning, on every rank.

    Raises:
        LockLostError: the directory is no longer this build's, on the ranks that see it.
        UserError: what the first rank that failed says, on every rank.
        KeyboardInterrupt: a rank was interrupted or terminated, on every rank.
    """
    config = work.config
    world = config.devices * config.num_nodes
    with ShardWriter(work.write, beside=work.target.device.type == "cuda") as writer, _quiet_lightning():
        trainer = L.Trainer(
            accelerator=config.accelerator,
            devices=config.devices,
            num_nodes=config.num_nodes,
            strategy=DDPStrategy(timeout=PATIENCE) if world > 1 else "auto",
            use_distributed_sampler=False,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        with Sigterm(lambda: _pass_on(trainer)) as sigterm:
            module = _ShardModule(work, writer, advance, sigterm, first)
            _predict(trainer, module)
            ends: list[Any] = [module.end]
            if torch.distributed.is_initialized():
                ends = [None] * torch.distributed.get_world_size()
                torch.distributed.all_gather_object(ends, module.end)
    require_all_done(ends)
    sigterm.check()


def _predict(trainer: L.Trainer, module: L.LightningModule) -> None:
    try:
        trainer.predict(module, return_predictions=False)
    except SystemExit as ended:
        if isinstance(ended.__context__, KeyboardInterrupt):  # which Lightning turns into a status of 1
            raise ended.__context__ from None
        raise


def _pass_on(trainer: L.Trainer) -> None:
    """Tell the ranks that this one has started: `kill` names one process only."""
    launcher = trainer.strategy.launcher
    if launcher is not None:
        launcher.kill(signal.SIGTERM)


def require_all_done(ends: Sequence[tuple[str | None, type[KeyboardInterrupt] | None]]) -> None:
    """Let no rank go on to finish the cache when one of them did not come to its end.

    Args:
        ends: of each rank its error, and what interrupted it.

    Raises:
        KeyboardInterrupt: one was interrupted, or terminated.
        UserError: what the first rank that failed says.
    """
    for _, interrupted in ends:
        if interrupted is not None:
            raise interrupted
    for error, _ in ends:
        if error is not None:
            raise UserError(error)


class _ShardModule(L.LightningModule):
    """Each prediction builds a shard. A rank that fails stays until the others are done, so that none waits for it."""

    def __init__(
        self, work: Build, writer: ShardWriter, advance: Advance, sigterm: Sigterm, first: _First | None
    ) -> None:
        super().__init__()
        # At a build's end there are fewer shards than ranks.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.work, self.writer, self.sigterm = work, writer, sigterm
        self._show, self._first = advance, first
        self.lock: BuildLock | RankLock | None = None if first is None else first.lock
        self.codec: FeatureCodec | None = None
        self.error: str | None = None
        self.interrupted: type[KeyboardInterrupt] | None = None

    @property
    def end(self) -> tuple[str | None, type[KeyboardInterrupt] | None]:
        """This rank's error, and what interrupted it."""
        return self.error, TerminatedError if self.sigterm.came else self.interrupted

    def predict_dataloader(self) -> DataLoader[int]:
        """This rank's missing shards; the first rank says which ones are missing, and under which lock."""
        said: Any = None if self._first is None else (self._first.missing, self._first.lock.me)
        missing, owner = self.trainer.strategy.broadcast(said, src=0)
        if self.lock is None:
            self.lock = RankLock(Location(self.work.config.out), owner)
        mine: Any = missing[self.trainer.global_rank :: self.trainer.world_size]
        return DataLoader(mine, batch_size=None, num_workers=0)

    def on_predict_start(self) -> None:
        """Answer SIGTERM again: Lightning's handler starts a collective wherever it comes, and then goes on."""
        self.sigterm.listen()

    def advance(self, tokens: int, documents: float) -> None:
        """Report a step, and end here if this rank is to."""
        assert self.lock is not None
        self.sigterm.check()
        self.lock.check()
        self._show(tokens, documents)

    def predict_step(self, number: int, *args: Any) -> None:
        """Build one shard."""
        if self.end != (None, None):
            return
        assert self.lock is not None
        with self._ends():
            self.lock.confirm()
            if self.codec is None:
                self.work.require_begun()
                self.codec = load_codec(self.work.config.out, self.work.identity)
            self.writer(number, *self.work.make(int(number), self.advance), self.codec, self.lock.confirm)

    def on_predict_end(self) -> None:
        """Wait for the last shard."""
        with self._ends():
            self.writer.finish()

    @contextlib.contextmanager
    def _ends(self) -> Iterator[None]:
        """Keep what ends this rank's work, for `_run` to raise."""
        try:
            yield
        except LockLostError:
            raise  # the first rank may be dead, and who waits for it waits for ever
        except UserError as error:
            self.error = str(error)
        except KeyboardInterrupt as stopped:
            # Lightning would end the process with a message of its own.
            self.interrupted = type(stopped)

    def transfer_batch_to_device(self, batch: int, device: torch.device, dataloader_idx: int) -> int:
        """A shard's number stays what it is."""
        return batch


def _advance(show: Show, ranks: float | int, lock: BuildLock | None = None) -> Advance:
    """Progress of all ranks by that of this one, and before they begin the check that the directory is still ours."""
    started, tokens = time.monotonic(), 0

    def advance(more_tokens: int, documents: float) -> None:
        nonlocal tokens
        if lock is not None:
            lock.check()
        tokens += more_tokens
        seconds = max(1e-9, time.monotonic() - started)
        show(float(documents * ranks), note=f"{tokens * ranks / seconds:,.0f} tokens/s")

    return advance


def _silent(units: float = 1, *, note: str = "") -> None:
    """Progress of ranks other than the first."""


@contextlib.contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Keep Lightning's hints off the terminal: what hardware there is, and that one could use more workers."""
    names = ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
