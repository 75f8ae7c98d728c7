"""However a step's documents are spread over ranks and micro-batches, it is the same step."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from specauf.callbacks import Throughput
from tests.processes import afresh
from tests.training.running import arguments, fit_here, logged

# The tiny cache has 18 training documents: 2 steps of 8 an epoch, 12 in all.
COMMON = ("--trainer.max_steps=12", "--trainer.max_epochs=20", "--trainer.limit_val_batches=0",
          "--data.anchors_per_document=5", "--model.optimizer.init_args.lr=3e-3",
          "--trainer.gradient_clip_val=0.5")  # fmt: skip
AVERAGED = Path(__file__).parents[2] / "configs/trainer/ema.yaml"
LAYOUTS = {
    "one": ("--data.batch_size=8",),
    # Averaged beside, which feeds nothing back.
    "two-ranks": ("--data.batch_size=4", "--trainer.devices=2", "--trainer.strategy=ddp", "-c", str(AVERAGED)),
    "accumulated": ("--data.batch_size=4", "--trainer.accumulate_grad_batches=2"),
}


def on_two_ranks(cache: Path, folder: Path, *options: str) -> Path:
    """The run's directory, which is not named: both ranks take that of the first, below where they are started."""
    words = [word for word in arguments(cache, folder, *options) if "default_root_dir" not in word]
    done = afresh("-m", "specauf", *words, folder=folder)
    assert done.returncode == 0, done.stderr
    (run,) = (folder / "runs").iterdir()
    assert json.loads((run / "run.json").read_text())["world_size"] == 2
    return run


def weights(run):
    checkpoint = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    return checkpoint.get("current_model_state", checkpoint["state_dict"])


@pytest.mark.parametrize("loss", ["auf", pytest.param("auf-block", marks=pytest.mark.slow)])
def test_one_rank_two_ranks_and_accumulation_agree(tiny_cache, tmp_path, loss):
    runs = {name: tmp_path / name for name in LAYOUTS}
    for name, layout in LAYOUTS.items():
        options = (f"--model.loss={loss}", *COMMON, *layout)
        if name == "two-ranks":
            runs[name] = on_two_ranks(tiny_cache, tmp_path, *options)
        else:
            assert fit_here(tiny_cache, runs[name], *options) == 0
    one = runs["one"]
    losses = logged(one)
    assert len(losses) == 12
    # AUF cut: the support is neither empty nor the whole block, and differs between steps.
    assert len({round(share, 3) for share in logged(one, "train/support_ratio").values()}) > 5
    for name in ("two-ranks", "accumulated"):
        run = runs[name]
        other = logged(run)
        assert list(other.values()) == pytest.approx(list(losses.values()), rel=1e-5, abs=1e-5)
        assert list(logged(run, "train/grad_norm").values()) == pytest.approx(
            list(logged(one, "train/grad_norm").values()), rel=1e-4
        )
        for key, value in weights(one).items():
            torch.testing.assert_close(weights(run)[key], value, rtol=1e-5, atol=1e-5)
        assert json.loads((run / "summary.json").read_text())["steps"] == 12


@pytest.mark.parametrize(
    ("drafter", "second"),
    [
        ("dflash2", "final_tau"),
        ("dspark", "confidence_error"),
        pytest.param("domino", "final_tau", marks=pytest.mark.slow),
    ],
)
def test_two_losses_are_on_two_ranks_what_they_are_on_one(tiny_cache, tmp_path, drafter, second):
    options = ("--model.loss=auf", f"--model.drafter={drafter}", *COMMON)
    one = tmp_path / "one"
    assert fit_here(tiny_cache, one, *options, *LAYOUTS["one"]) == 0
    two = on_two_ranks(tiny_cache, tmp_path, *options, *LAYOUTS["two-ranks"])
    for name in ("train/loss", "train/tau", f"train/{second}"):
        assert len(logged(one, name)) == 12
    assert list(logged(two).values()) == pytest.approx(list(logged(one).values()), rel=1e-5, abs=1e-5)
    for key, value in weights(one).items():
        torch.testing.assert_close(weights(two)[key], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("head", [(), ("--model.head_tokens=64",)])
def test_ddp_sends_no_frozen_vocabulary_around(tiny_cache, tmp_path, monkeypatch, head):
    seen, end = [], Throughput.on_train_batch_end

    def spied(self, trainer, *rest):
        end(self, trainer, *rest)
        seen.append((trainer.strategy.model, dict(trainer.lightning_module.named_buffers())))

    monkeypatch.setattr(Throughput, "on_train_batch_end", spied)
    options = ("--model.loss=auf", "--trainer.max_steps=1", "--trainer.limit_val_batches=0", "--trainer.strategy=ddp")
    assert fit_here(tiny_cache, tmp_path / "run", *options, *head) == 0
    ((wrapped, buffers),) = seen
    assert isinstance(wrapped, DistributedDataParallel)
    assert "vocabulary.embedding" in buffers
    assert ("head_vocabulary._head" in buffers) == bool(head)
    assert not wrapped.modules_buffers
