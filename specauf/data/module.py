"""The LightningDataModule: batches of blocks from a cache, with no target in sight."""

import itertools
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset

from specauf.cache import Cache, Document, open_cache
from specauf.data.batch import BlockBatch
from specauf.data.blocks import eligible_anchors, make_block_batch
from specauf.data.loader import BlockLoader
from specauf.data.sampler import ShardBatchSampler
from specauf.errors import UserError
from specauf.progress import progress

if TYPE_CHECKING:
    from specauf.module import DrafterModule


class CachedDocuments(Dataset[Document]):
    """Map-style access to a cache's documents; consecutive reads of one shard decode it once.

    What is damaged is returned, to be raised in the training process: torch adds a traceback to what a worker raises.
    """

    def __init__(self, cache: Cache, shards_in_memory: int, *, topk: bool, features: bool) -> None:
        self.cache, self.shards_in_memory = cache, shards_in_memory
        self.topk, self.features = topk, features

    def __getitems__(self, numbers: Sequence[int]) -> list[Document] | UserError:
        """The documents of one batch, or what is wrong with one of them."""
        try:
            return [
                self.cache.document(n, topk=self.topk, features=self.features, shards_in_memory=self.shards_in_memory)
                for n in numbers
            ]
        except UserError as error:
            return error


class _Collate:
    """Makes a block batch of a batch of documents, in the DataLoader's worker."""

    def __init__(self, sampler: ShardBatchSampler, **options: object) -> None:
        self.sampler, self.options = sampler, options

    def __call__(self, documents: list[Document] | UserError) -> BlockBatch | UserError:
        if isinstance(documents, UserError):
            return documents
        return make_block_batch(documents, epoch=self.sampler.epoch, **self.options)  # type: ignore[arg-type]


class CacheDataModule(L.LightningDataModule):
    """Blocks of cached documents for training; whole held-out documents for validation.

    Args:
        cache: directory or fsspec URL that `cache-builder build` wrote.
        batch_size: documents a step on one rank.
        anchors_per_document: blocks drawn from each document at each visit.
        window: shards mixed at once when shuffling; memory grows with it.
        num_workers: DataLoader processes; 0 reads in the training process.
        validation_documents: documents to replay at each validation; 0 for all.
        max_documents: train on the first so many documents only, to debug; null for all.
        validate_on: which documents validation replays: those held out, or those trained on (to see overfitting).
        seed: of document order and anchors; default the run's `seed_everything`.
    """

    def __init__(
        self,
        cache: str,
        batch_size: int = 16,
        anchors_per_document: int = 12,
        window: int = 4,
        num_workers: int = 0,
        validation_documents: int = 64,
        max_documents: int | None = None,
        validate_on: Literal["held_out", "train"] = "held_out",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        for name, value in (
            ("num_workers", num_workers),
            ("validation_documents", validation_documents),
            ("seed", 0 if seed is None else seed),
        ):
            if value < 0:
                raise UserError(f"data.{name} is {value}: give at least 0")
        for name, value in (
            ("batch_size", batch_size),
            ("anchors_per_document", anchors_per_document),
            ("window", window),
            ("max_documents", 1 if max_documents is None else max_documents),
        ):
            if value < 1:
                raise UserError(f"data.{name} is {value}: give at least 1")
        self.url, self.batch_size, self.anchors_per_document = cache, batch_size, anchors_per_document
        self.window, self.num_workers, self.validation_documents = window, num_workers, validation_documents
        self.max_documents, self.validate_on = max_documents, validate_on
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", "0")) if seed is None else seed
        self._cache: Cache | None = None
        self._loader: BlockLoader | None = None
        self._position: dict[str, Any] | None = None

    @property
    def cache(self) -> Cache:
        """The open cache; opened at first use."""
        if self._cache is None:
            self._cache = open_cache(self.url)
        return self._cache

    def training_documents(self) -> list[list[int]]:
        """Numbers of the documents a block can be drawn from, by shard.

        Raises:
            UserError: there are none.
        """
        by_shard = []
        with progress("loss masks", float(self.cache.num_shards), unit="shards", initial=0.0) as show:
            for eligible in self._eligible("train"):
                by_shard.append(eligible)
                show(1)
        if not any(by_shard):
            raise UserError(
                f"cache {self.url} has no training document with two supervised tokens in a row: build it from answers"
            )
        left = sum(map(len, by_shard)) if self.max_documents is None else self.max_documents
        for number, shard in enumerate(by_shard):
            by_shard[number] = shard[:left]
            left -= len(by_shard[number])
        return [s for s in by_shard if s]

    def _eligible(self, split: Literal["train", "held_out"]) -> Iterator[list[int]]:
        """Numbers of a split's documents a block can be drawn from, shard by shard."""
        for masks in self.cache.loss_masks(split):
            yield [n for n, mask in masks if len(eligible_anchors(mask))]

    @property
    def _model(self) -> "DrafterModule":
        assert self.trainer is not None
        return cast("DrafterModule", self.trainer.lightning_module)

    def train_dataloader(self) -> BlockLoader:
        """Batches of blocks, shuffled anew each epoch."""
        assert self.trainer is not None
        trainer, module = self.trainer, self._model
        _require_own_order(trainer)
        accumulate = trainer.accumulate_grad_batches
        sampler = ShardBatchSampler(
            self.training_documents(),
            self.batch_size,
            shuffle=True,
            seed=self.seed,
            window=self.window,
            accumulate=accumulate,
            rank=trainer.global_rank,
            world=trainer.world_size,
        )
        documents, step = sum(len(s) for s in sampler.shards), self.batch_size * trainer.world_size * accumulate
        if documents < step:
            raise UserError(
                f"data.batch_size: a step of {self.batch_size} documents x {trainer.world_size} ranks x {accumulate} "
                f"accumulated batches needs {step} documents, cache {self.url} has {documents} for training: "
                "lower --data.batch_size"
            )
        collate = _Collate(
            sampler,
            block_size=module.block_size,
            anchors_per_document=self.anchors_per_document,
            seed=self.seed,
            teacher=module.needs_teacher,
            features=module.needs_features,
            # Autocast would round them so in the drafter's first layer: half of the bytes on their way to a GPU.
            feature_dtype=module.computed_in,
        )
        limit = trainer.limit_train_batches
        # Lightning's rule: an int counts batches, a float is a share of them.
        batches = min(len(sampler), limit) if isinstance(limit, int) else int(len(sampler) * limit)
        before = self._loader
        self._loader = BlockLoader(
            sampler,
            identity={
                "cache": self.cache.fingerprint,
                "data.batch_size": self.batch_size,
                "data.anchors_per_document": self.anchors_per_document,
                "data.window": self.window,
                "data.seed": self.seed,
                "data.max_documents": self.max_documents,
                "number of ranks": trainer.world_size,
                "trainer.accumulate_grad_batches": accumulate,
                # None where nothing is left out: 1 and 1.0 are equal in Python, and old checkpoints have no such key.
                "trainer.limit_train_batches": limit if batches < len(sampler) else None,
            },
            epoch_batches=batches,
            dataset=CachedDocuments(self.cache, self.window, topk=module.needs_teacher, features=module.needs_features),
            collate_fn=collate,
            num_workers=self.num_workers,
            pin_memory=trainer.strategy.root_device.type == "cuda",
        )
        if self._position is not None:
            self._loader.load_state_dict(self._position)
            self._position = None
        elif before is not None and trainer.global_step:  # the same trainer's second `fit`, which counts epochs on
            self._loader.begin_after(before)
        return self._loader

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Blocks go to the device; whole documents stay as they are, replay moves what it packs."""
        return batch.to(device) if isinstance(batch, BlockBatch) else batch

    def state_dict(self) -> dict[str, Any]:
        """The position in the training data, for the checkpoint."""
        if self._loader is None:
            return {}
        position = self._loader.state_dict()
        if self.trainer is not None and self.trainer.training:
            # A checkpoint from the middle of a batch (a signal's, an exception's): Lightning does that batch again.
            counted = self.trainer.fit_loop.epoch_loop.batch_progress.current
            position["batches"] -= counted.ready - counted.processed  # type: ignore[attr-defined]
        return {"position": position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember a checkpoint's position for the loader to come.

        Lightning would hand it to the loader itself, but too late: asking for the run's length, as a schedule must,
        makes the loader before the loops are restored.
        """
        self._position = state_dict.get("position")

    def val_dataloader(self) -> DataLoader:
        """Documents whole, for exact replay; held-out ones unless the run debugs overfitting."""
        assert self.trainer is not None
        if self.validate_on == "train":
            numbers = [n for shard in self.training_documents() for n in shard]
        else:
            # Shards behind the last document that is wanted are not read.
            found = (n for shard in self._eligible("held_out") for n in shard)
            numbers = list(itertools.islice(found, self.validation_documents or None))
        if not numbers:
            raise UserError(
                f"cache {self.url} has {len(self.cache)} documents, none of them held out to validate on: give "
                "--data.validate_on=train or --trainer.limit_val_batches=0, or rebuild it with a larger --held_out"
            )
        if self.validation_documents:
            numbers = numbers[: self.validation_documents]
        sampler = ShardBatchSampler(
            [numbers],
            min(16, len(numbers)),
            shuffle=False,
            seed=0,
            drop_last=False,
            rank=self.trainer.global_rank,
            world=self.trainer.world_size,
        )
        return DataLoader(
            CachedDocuments(self.cache, self.window, topk=False, features=self._model.needs_features),
            batch_sampler=sampler,
            collate_fn=_as_is,
        )


def _require_own_order(trainer: L.Trainer) -> None:
    """Refuse options of the trainer under which batches would not be what they promise.

    Raises:
        UserError: naming the option and what does the same.
    """
    share = trainer.overfit_batches  # type: ignore[attr-defined]
    if share:
        raise UserError(
            f"trainer.overfit_batches is {share}, but every epoch draws other anchors: leave it "
            "out and give -c configs/debug/overfit.yaml"
        )
    every = trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
    if every:
        raise UserError(
            f"trainer.reload_dataloaders_every_n_epochs is {every}, and every reload would begin with the first "
            "epoch's order again: leave it out, each epoch is shuffled anew"
        )


def _as_is(documents: list[Document] | UserError) -> list[Document]:
    if isinstance(documents, UserError):
        raise documents
    return documents
