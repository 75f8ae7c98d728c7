"""Runs in the environment `specforge`: optimizer steps of its own trainer, up to the optimizer itself.

Arguments: file with `embedding`, `head` and `tasks`, file to write the results to. A task is a dict with `directory`,
`attention`, `settings` (of the training model), `step` of `steps`, and `micro`, the step's micro-batches: `input_ids`
and `loss_mask` [sequences tokens], `hidden_states` [sequences tokens features], DSpark's `target_last_hidden_states`
[sequences tokens hidden], and the `anchors` to take, those that
are to `keep` [sequences blocks]. All runs in the features' dtype. Results: `losses` of the micro-batches, the step's
`loss` as the trainer reports it, and `grads` by name.
"""

import sys

import torch
from specforge.algorithms.common.dflash_family_model import OnlineDFlashModel, OnlineDominoModel, OnlineDSparkModel
from specforge.modeling.draft.dflash import DFlashDraftModel
from specforge.modeling.draft.domino import DominoDraftModel
from specforge.modeling.draft.dspark import DSparkDraftModel
from specforge.runtime.contracts import TrainBatch
from specforge.training.backend import FSDPTrainingBackend, ParallelConfig
from specforge.training.controller import TrainerCore
from specforge.training.strategies.base import (
    DFlashTrainStrategy,
    DominoTrainStrategy,
    DSparkTrainStrategy,
    StepContext,
)

from tests.interop.specforge_models import load, target

MODELS = {
    DFlashDraftModel: (OnlineDFlashModel, DFlashTrainStrategy, {}),
    DominoDraftModel: (OnlineDominoModel, DominoTrainStrategy, {"lambda_start": 1.0, "decay_ratio": 1.0}),
    DSparkDraftModel: (OnlineDSparkModel, DSparkTrainStrategy, {}),
}


class NoOptimizer:
    """Leaves the gradients as the trainer hands them over."""

    def step(self) -> None:
        """Nothing."""


def run(task: dict, embedding: torch.Tensor, head: torch.Tensor) -> dict:
    dtype = task["micro"][0]["hidden_states"].dtype
    drafter = load(task["directory"], task["attention"]).to(dtype).train()
    online, strategy_of, settings = MODELS[type(drafter)]
    owner = target(embedding.to(dtype), head.to(dtype))
    model = online(
        drafter,
        owner.lm_head,
        owner.model.embed_tokens,
        mask_token_id=drafter.mask_token_id,
        block_size=drafter.block_size,
        attention_backend=task["attention"],
        **task["settings"],
    )
    micro = [dict(batch) for batch in task["micro"]]
    chosen = iter([(batch.pop("anchors"), batch.pop("keep")) for batch in micro])
    model._sample_anchor_positions = lambda *_: next(chosen)
    strategy = strategy_of(model, **settings)
    backend = FSDPTrainingBackend(ParallelConfig())
    backend.prepare_model(model, wrap=False)
    backend.set_optimizer(NoOptimizer())
    core = TrainerCore(strategy, backend, accumulation_steps=len(micro))
    context = StepContext(task["step"], task["steps"])
    losses = []
    # The trainer reports the loss of a step alone.
    model.register_forward_hook(lambda _, given, out: losses.append(out[0].item()))
    for batch in micro:
        result = core.train_step(TrainBatch([], strategy.name, batch), context)
    assert result.optimizer_stepped
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in drafter.named_parameters()}
    return {"losses": losses, "loss": result.loss, "grads": grads}


given = torch.load(sys.argv[1], weights_only=True)
torch.save([run(task, given["embedding"], given["head"]) for task in given["tasks"]], sys.argv[2])
