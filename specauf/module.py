"""The LightningModule: wires a drafter, an objective and an optimizer together, and holds no mathematics of its own."""

import os
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from specauf.cache import Cache, Document
from specauf.checkpoint import FORMAT
from specauf.data.batch import BlockBatch, BlockTargets
from specauf.data.vocabulary import frequent_tokens
from specauf.decoding.replay import replay
from specauf.drafters import Drafter, DrafterSpec, TargetVocabulary, sketch_of
from specauf.errors import UserError
from specauf.metrics import EmittedLength, SlotAcceptance
from specauf.objectives import Objective, block_loss, global_mean
from specauf.objectives.support import only_on, whole_block
from specauf.schedules import Schedule, WarmupCosine


class DrafterModule(L.LightningModule):
    """Trains one drafter against the distributions and features in a cache.

    Args:
        loss: what the slots are trained with; see `configs/loss/`.
        drafter: which drafter to build for the cache's target; see `configs/drafter/`.
        optimizer: built from the trainable parameters.
        schedule: learning-rate schedule over the whole run.
        head_tokens: train on the rows of the LM head of this many most frequent tokens of the cache's answers; None for
            the whole vocabulary. Decoding always uses the whole head.
        chunk_blocks: blocks whose logits exist at the same time.
    """

    def __init__(
        self,
        loss: Objective,
        drafter: DrafterSpec,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=6e-4, weight_decay=0.0),
        schedule: Schedule = WarmupCosine(),  # noqa: B008  (holds two numbers and no state)
        head_tokens: int | None = None,
        chunk_blocks: int = 64,
    ) -> None:
        super().__init__()
        if head_tokens is not None and head_tokens < 2:
            raise UserError(f"model.head_tokens is {head_tokens}: give at least 2, or null for the whole vocabulary")
        self.objective, self.spec = loss, drafter
        self.optimizer, self.schedule = optimizer, schedule
        self.head_tokens, self.chunk_blocks = head_tokens, chunk_blocks
        self.emitted, self.acceptance = EmittedLength(), SlotAcceptance(drafter.block_size - 1)
        self.drafter: Drafter | None = None

    @property
    def block_size(self) -> int:
        """Slots of a block, the anchor's own included."""
        return self.spec.block_size

    @property
    def needs_teacher(self) -> bool:
        """The objective asks for the target's top-k."""
        return self.objective.needs_teacher

    @property
    def needs_features(self) -> bool:
        """The drafter reads the target's features."""
        return self.spec.needs_features

    def configure_model(self) -> None:
        """Build the drafter for the cache's target, once per process.

        The initial weights depend on the run's seed alone, so two losses with one seed start from the same drafter.
        """
        if self.drafter is not None:
            return
        cache: Cache = self.trainer.datamodule.cache  # type: ignore[attr-defined]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(os.environ.get("PL_GLOBAL_SEED", "0")))
            self.drafter = self.spec.build(cache.manifest, cache.target)
        self.vocabulary = TargetVocabulary.from_cache(cache)
        self.head_vocabulary = self.vocabulary
        if self.head_tokens is not None and self.head_tokens < cache.manifest.identity.vocab_size:
            self.head_vocabulary = self.vocabulary.restrict(frequent_tokens(cache, self.head_tokens))

    def training_step(self, batch: BlockBatch, batch_idx: int) -> Tensor:
        """Loss of one batch of blocks; a mean over the supported slots (or blocks) of all ranks."""
        assert self.drafter is not None
        batch = batch.with_targets(to_head_vocabulary(batch.targets, self.head_vocabulary))
        loss = torch.zeros((), device=self.device)
        base_weights = None
        for branch in self.drafter.branches(batch, self.head_vocabulary, self.progress):
            objective, targets = self.objective, batch.targets
            if branch.support != "own":
                objective = whole_block(objective)
            if branch.support == "base":
                assert base_weights is not None
                targets = only_on(targets, base_weights)
            out = block_loss(
                branch.rows, branch.head, targets, objective, step=self.global_step, chunk_blocks=self.chunk_blocks
            )
            base_weights = out.weights if base_weights is None else base_weights
            loss = loss + branch.weight * global_mean(out.numerator, out.denominator)
            prefix = "train/" if branch.name == "base" else f"train/{branch.name}_"
            self.log_dict({prefix + name: value for name, value in out.summary().items()})
        if not torch.isfinite(loss):
            raise UserError(
                f"the loss is {loss.item()} at step {self.global_step}, batch {batch_idx}, documents "
                f"{', '.join(map(str, batch.doc_ids))}: lower the learning rate, or check with cache-builder verify"
            )
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/lr", self.optimizers().param_groups[0]["lr"])  # type: ignore[union-attr]
        return loss

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Blocks go to the device; whole documents stay as they are, replay moves what it packs."""
        return batch.to(device) if isinstance(batch, BlockBatch) else batch

    @property
    def progress(self) -> float:
        """Share of the run behind us, for curricula."""
        return self.global_step / max(1, int(self.trainer.estimated_stepping_batches))

    def validation_step(self, documents: list[Document], batch_idx: int) -> None:
        """Replay whole held-out documents as greedy decoding would go through them; needs no target."""
        assert self.drafter is not None
        for accepted, slots in replay(self.drafter, self.vocabulary, documents, block_size=self.block_size):
            self.emitted.update(accepted)
            self.acceptance.update(accepted, slots)

    def on_validation_epoch_end(self) -> None:
        """Log tau and survival per slot over the held-out split."""
        self.log("val/tau", self.emitted.compute(), prog_bar=True)
        for k, share in enumerate(self.acceptance.compute()["survival"], start=1):
            self.log(f"val/survival_slot_{k}", share)
        self.emitted.reset()
        self.acceptance.reset()

    def configure_optimizers(self) -> Any:
        """The injected optimizer over the trainable parameters, with the schedule over the run's length."""
        assert self.drafter is not None
        optimizer = self.optimizer([p for p in self.drafter.parameters() if p.requires_grad])
        total = int(self.trainer.estimated_stepping_batches)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.schedule.build(optimizer, total), "interval": "step"},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what rebuilds the drafter without the cache."""
        assert self.drafter is not None
        cache: Cache = self.trainer.datamodule.cache  # type: ignore[attr-defined]
        checkpoint["specauf"] = {
            "format": FORMAT,
            "drafter": self.spec.name,
            "config": self.drafter.config.to_dict(),
            "cache_fingerprint": cache.fingerprint,
            "sketch": sketch_of(cache.target) if self.needs_features else None,
        }


def to_head_vocabulary(targets: BlockTargets, vocabulary: TargetVocabulary) -> BlockTargets:
    """The targets in the head's own numbers; a label outside the head makes its slot invalid and so ends the block."""
    if not vocabulary.restricted:
        return targets
    labels, known = vocabulary.to_draft(targets.labels)
    teacher_ids, teacher_logprobs, head_mass = targets.teacher_ids, targets.teacher_logprobs, targets.head_mass
    if teacher_ids is not None and teacher_logprobs is not None:
        teacher_ids, kept = vocabulary.to_draft(teacher_ids)
        teacher_logprobs = teacher_logprobs.masked_fill(~kept, -torch.inf)
        head_mass = teacher_logprobs.exp().sum(-1)
    return BlockTargets(labels, targets.valid & known, teacher_ids, teacher_logprobs, head_mass)
