"""What a resumed run must have in common with the run that wrote its checkpoint, and where it goes on.

Lightning restores the optimizer's settings from the checkpoint, so a flag such as the learning rate would be ignored
without a word. Here it is refused instead.
"""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback, WeightAveraging
from torch.optim import Optimizer

from specauf.errors import UserError

_SKIPPED = ("params", "lr", "initial_lr")


def check_same_run(about: dict[str, Any], *, cache: str, drafter: str, config: dict[str, Any]) -> None:
    """Refuse to go on with another cache or another drafter.

    Args:
        about: what the checkpoint says under the key `specauf`.
        cache: fingerprint of the cache that is open now.
        drafter: kind of the drafter that was built now.
        config: its config.

    Raises:
        UserError: naming the first field that differs, with both values.
    """
    if about["cache_fingerprint"] != cache:
        raise UserError(
            f"--ckpt_path: its run read the cache {about['cache_fingerprint'][:12]}, data.cache is {cache[:12]}: give "
            "that cache, or start a new run from the exported drafter with --model.drafter.init_args.init=DIRECTORY"
        )
    before = {"drafter": about["drafter"], **about["config"]}
    for name, value in {"drafter": drafter, **config}.items():
        saved = before.get(name)
        # A checkpoint's tuples come back as they went in, JSON's as lists.
        if (list(saved) if isinstance(saved, tuple) else saved) != (list(value) if isinstance(value, tuple) else value):
            raise UserError(
                f"--ckpt_path: its drafter has {name} {saved}, model.drafter gives {value}: resume with the run's own "
                "config.yaml, or start a new run"
            )


def check_weights(checkpoint: dict[str, Any], callbacks: Sequence[Callback]) -> None:
    """Refuse weights that an unbroken run would not go on from.

    Args:
        checkpoint: as Lightning has written it.
        callbacks: of the run now.

    Raises:
        UserError: they are an average without what averages, or the optimizer was at work on them.
    """
    if "current_model_state" in checkpoint and not any(isinstance(c, WeightAveraging) for c in callbacks):
        raise UserError(
            "--ckpt_path: its run averages weights, trainer.callbacks has nothing that does: resume with the run's own "
            "config.yaml, or start a new run from the average with --model.drafter.init_args.init=RUN"
        )
    if checkpoint["specauf"].get("half_changed"):
        raise UserError(
            "--ckpt_path: it was written while the optimizer changed the weights, whose step would be made "
            "twice: give the run's checkpoints/last.ckpt"
        )


def check_same_optimizer(saved: list[dict[str, Any]], optimizer: Optimizer) -> None:
    """Refuse optimizer settings that resuming would silently replace by those of the checkpoint.

    Args:
        saved: parameter groups of the checkpoint's optimizer.
        optimizer: as it was made now.

    Raises:
        UserError: naming the first setting that differs, with both values.
    """
    for before, now in zip(saved, optimizer.param_groups, strict=False):
        wanted = {"lr": (before.get("initial_lr", before["lr"]), now["lr"])}
        wanted |= {n: (before.get(n), now.get(n)) for n in {**before, **now} if n not in _SKIPPED}
        for name, (old, new) in wanted.items():
            if old != new and not isinstance(new, torch.Tensor):
                raise UserError(
                    f"--ckpt_path: its optimizer has {name} {old}, model.optimizer gives {new}: resume with the same "
                    "value, or start a new run"
                )


def back_to_whole_steps(checkpoint: dict[str, Any], position: dict[str, Any]) -> None:
    """Let a checkpoint from the middle of a step (a signal's, an exception's, a clock's) go on at that step's start.

    No checkpoint holds the gradients so far. The counters become those from behind the batch before.

    Args:
        checkpoint: as Lightning has written it.
        position: in the data, within it.
    """
    loops = checkpoint["loops"]["fit_loop"]
    progress = loops["epoch_loop.batch_progress"]
    now = progress["current"]
    in_batch = now["ready"] > now["processed"]
    ends_epoch = progress["is_last_batch"] and not in_batch  # which ends its step, however few its batches
    undone = 0 if ends_epoch else now["processed"] % position["trainer.accumulate_grad_batches"]
    if not (in_batch or undone):
        return
    position["batches"] -= undone
    progress["is_last_batch"] = False
    for counts in (now, progress["total"]):
        first = counts["processed"] - undone
        # Lightning completes that batch, and counts its step, when it restarts.
        counts |= {"ready": first, "started": first, "processed": first, "completed": first - 1}
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] = checkpoint["global_step"] - 1


def rng_state() -> dict[str, torch.Tensor]:
    """States of torch's generators; all other randomness of a run is a function of (seed, epoch, document)."""
    found = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def restore_rng(state: dict[str, torch.Tensor]) -> None:
    """Put torch's generators back to a saved state."""
    torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
