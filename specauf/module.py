"""The LightningModule: wires a drafter, an objective and an optimizer together, and holds no mathematics of its own."""

import os
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer

from specauf.cache import Cache, Document
from specauf.checkpoint import FORMAT
from specauf.data.batch import BlockBatch, BlockTargets
from specauf.data.vocabulary import frequent_tokens
from specauf.decoding.replay import replay
from specauf.drafters import Drafter, DrafterSpec, TargetVocabulary, sketch_of
from specauf.drafters.spec import require_kind
from specauf.errors import UserError
from specauf.loggers import log_when_measured
from specauf.metrics import EmittedLength, SlotAcceptance
from specauf.objectives import Objective, StepMean
from specauf.objectives.support import branch_losses
from specauf.other_cache import check_same_drafter, for_sketch
from specauf.resume import (
    back_to_whole_steps,
    check_same_optimizer,
    check_same_run,
    check_weights,
    restore_rng,
    rng_state,
)
from specauf.schedules import Schedule, WarmupCosine

COMPUTED_IN = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class SharedFactory:
    """Makes the optimizer, and is the same in copies of the module, which averaged weights are.

    A command line's factory holds that command line, with its trainer, its cache and the processes of the other ranks.
    """

    def __init__(self, make: OptimizerCallable) -> None:
        self.make = make

    def __call__(self, parameters: list[nn.Parameter]) -> Optimizer:
        """The optimizer."""
        return self.make(parameters)

    def __deepcopy__(self, memo: dict[int, Any]) -> "SharedFactory":
        """Itself."""
        return self


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
        compile: let torch.compile make programs of the drafter's layers; pays off on GPUs, after a minute at the start.
        full_block_every: steps between looks at every slot of the block, to log token accuracy even under a loss that
            computes only the slots it needs; 0 for never.
    """

    def __init__(
        self,
        loss: Objective,
        drafter: DrafterSpec,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=6e-4, weight_decay=0.0),
        schedule: Schedule = WarmupCosine(),  # noqa: B008  (holds two numbers and no state)
        head_tokens: int | None = None,
        chunk_blocks: int = 64,
        full_block_every: int = 100,
        compile: bool = False,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("chunk_blocks", chunk_blocks, 1),
            ("full_block_every", full_block_every, 0),
            ("drafter.block_size", drafter.block_size, 2),
        ):
            if value < least:
                raise UserError(f"model.{name} is {value}: give at least {least}")
        if head_tokens is not None and head_tokens < 2:
            raise UserError(f"model.head_tokens is {head_tokens}: give at least 2, or null for the whole vocabulary")
        self.objective, self.spec = loss, drafter
        self.optimizer, self.schedule = SharedFactory(optimizer), schedule
        self.head_tokens, self.chunk_blocks, self.full_block_every = head_tokens, chunk_blocks, full_block_every
        self.compiled = compile
        self._means: list[StepMean] = []
        self._losses: list[tuple[Tensor, str]] = []  # of the step's micro-batches, and where each was
        self._resumed: dict[str, Any] | None = None
        self._stepping = False  # the optimizer may have changed weights for a batch that is not done
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

    @property
    def computed_in(self) -> torch.dtype | None:
        """What mixed precision computes products in; None in full precision."""
        return COMPUTED_IN.get(str(self.trainer.precision))

    def configure_model(self) -> None:
        """Build the drafter for the cache's target, once per process.

        The initial weights depend on the run's seed alone, so two losses with one seed start from the same drafter.
        """
        if self.drafter is not None:
            return
        cache: Cache = self.trainer.datamodule.cache  # type: ignore[attr-defined]
        # On the CPU, where Lightning would build on its device: a seed's weights are the same on all of them.
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(int(os.environ.get("PL_GLOBAL_SEED", "0")))
            self.drafter = self.spec.build(cache.manifest, cache.target)
        require_kind(self.spec, self.drafter)
        if self.compiled:
            self.drafter.compile_rows()
        self.vocabulary = TargetVocabulary.from_cache(cache)
        self.head_vocabulary = self.vocabulary
        if self.head_tokens is not None and self.head_tokens < cache.manifest.identity.vocab_size:
            self.head_vocabulary = self.vocabulary.restrict(frequent_tokens(cache, self.head_tokens))
        if self.computed_in is not None:
            # Autocast would cast the whole head for every chunk of rows, and come to the same numbers.
            for vocabulary in {self.vocabulary, self.head_vocabulary}:
                vocabulary.hold_head_in(self.computed_in)
        # DDP's name. Every rank has read these from the cache; DDP would send them anew at every forward pass.
        self._ddp_params_and_buffers_to_ignore = [
            name for name, _ in self.named_buffers() if name.startswith(("vocabulary.", "head_vocabulary."))
        ]

    def on_fit_start(self) -> None:
        """Have both vocabularies share one embedding again: moving a module moves each of its buffers."""
        # Two tensors of one storage: averaged weights pair buffers by their order, in which one tensor counts once.
        self.head_vocabulary.embedding = self.vocabulary.embedding.detach()

    def training_step(self, batch: BlockBatch, batch_idx: int) -> Tensor:
        """Loss of one batch of blocks: a mean over the supported slots (or blocks) of all ranks and the whole step."""
        assert self.drafter is not None
        batch = batch.with_targets(to_head_vocabulary(batch.targets, self.head_vocabulary))
        loss, value = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        branches = self.drafter.branches(batch, self.head_vocabulary, self.progress)
        if len(branches) > 1 and self.trainer.accumulate_grad_batches > 1:
            # Their denominators differ: no factor makes one exact gradient of their summed gradients.
            raise UserError(
                f"trainer.accumulate_grad_batches is {self.trainer.accumulate_grad_batches} but the {self.spec.name} "
                f"drafter has {len(branches)} losses: set it to 1 and raise --data.batch_size or the number of ranks"
            )
        self._means = self._means or [StepMean() for _ in branches]
        looks = self.full_block_every > 0 and (self.global_step + 1) % self.full_block_every == 0
        outputs = branch_losses(
            branches,
            batch.targets,
            self.objective,
            step=self.global_step,
            chunk_blocks=self.chunk_blocks,
            every_slot=looks,
        )
        for mean, (branch, out) in zip(self._means, outputs, strict=True):
            loss = loss + branch.weight * mean.add(out.numerator, out.denominator)
            value = value + branch.weight * mean.value
            prefix = "train/" if branch.name == "base" else f"train/{branch.name}_"
            summary = {prefix + name: value for name, value in out.summary().items()}
            log_when_measured(self, summary, prefix + "token_accuracy", batch_idx, at_once=looks)
            self.log_dict(summary)
        where = f"step {self.global_step}, batch {batch_idx}, documents {', '.join(map(str, batch.doc_ids))}"
        self._losses.append((value.detach(), where))
        self.log("train/loss", value, prog_bar=True)
        self.log("train/lr", self.optimizers().param_groups[0]["lr"])  # type: ignore[union-attr]
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Make the gradients those of the whole step's mean, before they are clipped."""
        assert self.drafter is not None
        for mean in self._means:
            mean.finish(self.drafter.parameters(), divided_by=self.trainer.accumulate_grad_batches)
        self._means = []
        norm = torch.nn.utils.get_total_norm(p.grad for p in self.drafter.parameters() if p.grad is not None)
        self._check_finite(norm)
        self.log("train/grad_norm", norm)
        self._stepping = True

    def on_train_batch_end(self, *args: Any) -> None:
        """The optimizer has done its work, if there was any."""
        self._stepping = False

    def _check_finite(self, norm: Tensor) -> None:
        """The losses of the step, and its gradient's norm; one wait for the device, not one for each."""
        found = [("the loss", value, where) for value, where in self._losses]
        # A gradient scaler (16-mixed) leaves such a step out itself and goes on with a smaller scale.
        if getattr(self.trainer.precision_plugin, "scaler", None) is None:
            found.append(("the gradient's norm", norm, self._losses[-1][1]))
        self._losses = []
        for finite, (what, value, where) in zip(
            torch.stack([value.isfinite() for _, value, _ in found]).tolist(), found, strict=True
        ):
            if not finite:
                raise UserError(
                    f"{what} is {value.item()} at {where}: lower --model.optimizer.init_args.lr, or look for damage "
                    "with cache-builder verify; the last checkpoint is from before"
                )

    @property
    def progress(self) -> float:
        """Share of the run behind us, for curricula."""
        return self.global_step / max(1, self.trainer.estimated_stepping_batches)  # 0 in a run without end

    def validation_step(self, documents: list[Document], batch_idx: int) -> None:
        """Replay whole held-out documents as greedy decoding would go through them; needs no target."""
        assert self.drafter is not None
        for accepted, slots in replay(self.drafter, self.vocabulary, documents, block_size=self.block_size):
            accepted = accepted.to(self.device)  # a replay's counts are on the CPU, metrics where the module is
            self.emitted.update(accepted)
            self.acceptance.update(accepted, slots.to(self.device))

    def on_validation_epoch_end(self) -> None:
        """Log tau and survival per slot over the held-out split."""
        # Of all ranks already; sync_dist tells Lightning so.
        self.log("val/tau", self.emitted.compute(), prog_bar=True, sync_dist=True)
        # Flattened: torchmetrics takes the axis from a block's only slot.
        for k, share in enumerate(self.acceptance.compute()["survival"].flatten(), start=1):
            self.log(f"val/survival_slot_{k}", share, sync_dist=True)
        self.emitted.reset()
        self.acceptance.reset()

    def configure_optimizers(self) -> Any:
        """The injected optimizer over the trainable parameters, with the schedule over the run's length."""
        assert self.drafter is not None
        try:
            optimizer = self.optimizer([p for p in self.drafter.parameters() if p.requires_grad])
        except ValueError as error:  # what torch's optimizers say of their settings
            said = " ".join(str(error).split())[:200]
            raise UserError(f"model.optimizer: {said}: correct its init_args, or choose another class_path") from error
        if self._resumed is not None:
            check_same_optimizer(self._resumed["optimizer_states"][0]["param_groups"], optimizer)
        total = self.trainer.estimated_stepping_batches
        self.schedule.require_length(total)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.schedule.build(optimizer, total), "interval": "step"},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what rebuilds the drafter without the cache."""
        assert self.drafter is not None
        cache: Cache = self.trainer.datamodule.cache  # type: ignore[attr-defined]
        batches = self.trainer.fit_loop.epoch_loop.batch_progress.current
        checkpoint["specauf"] = {
            "format": FORMAT,
            "drafter": self.spec.name,
            "config": self.drafter.config.to_dict(),
            "cache_fingerprint": cache.fingerprint,
            "target": cache.manifest.identity.target,
            "sketch": sketch_of(cache.target) if self.needs_features else None,
            "rng": rng_state(),
            "half_changed": self._stepping and batches.ready > batches.processed,  # type: ignore[attr-defined]
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the checkpoint's cache, drafter and optimizer only; validate on any cache of its target."""
        assert self.drafter is not None
        datamodule = self.trainer.datamodule  # type: ignore[attr-defined]
        cache: Cache = datamodule.cache
        if self.trainer.state.fn == TrainerFn.FITTING:
            check_same_run(
                checkpoint["specauf"],
                cache=cache.fingerprint,
                drafter=self.drafter.name,
                config=self.drafter.config.to_dict(),
            )
            check_weights(checkpoint, self.trainer.callbacks)  # type: ignore[attr-defined]
            position = checkpoint.get(type(datamodule).__qualname__, {}).get("position")
            if position is not None:  # else it was saved before the first batch
                back_to_whole_steps(checkpoint, position)
            self._resumed = checkpoint
            return
        check_same_drafter(checkpoint["specauf"], cache, self.drafter)
        if self.needs_features:
            weights, old = checkpoint["state_dict"], checkpoint["specauf"]["sketch"]
            weights["drafter.fc.weight"] = for_sketch(weights["drafter.fc.weight"], old, sketch_of(cache.target))

    def on_train_start(self) -> None:
        """Put the random generators back; making the data loader's iterator has moved them."""
        if self._resumed is not None:
            restore_rng(self._resumed["specauf"]["rng"])
            self._resumed = None


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
