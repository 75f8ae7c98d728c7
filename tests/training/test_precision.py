"""Weights stay fp32 and whole: what casts or cuts them is refused, mixed precisions train."""

import math

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from specauf import module
from specauf.drafters import TargetVocabulary
from tests.training.running import fit_here, logged

OPTIONS = ("--model.loss=auf", "--trainer.limit_val_batches=0")
PLUGIN = "--trainer.plugins=lightning.pytorch.plugins."


class TooLargeAScale(MixedPrecision):
    """fp16 on the CPU, which Lightning's flag does not give, with a scale that overflows until it has been halved."""

    def __init__(self) -> None:
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=10000))


@pytest.mark.parametrize(
    ("option", "says"),
    [
        *((f"--trainer.precision={name}", f"trainer.precision is {name}: give bf16-mixed") for name in
          ("bf16-true", "16-true", "64-true", "64", "transformer-engine")),
        (f"{PLUGIN}HalfPrecision", "trainer.precision is 16-true: give bf16-mixed"),
        (f"{PLUGIN}DoublePrecision", "trainer.precision is 64-true: give bf16-mixed"),
        ("--trainer.precision=16-mixed", "trainer.precision is 16-mixed, which CPUs do not have: give bf16-mixed"),
        ("--trainer.strategy=fsdp", "trainer.strategy is fsdp, which cuts the drafter into pieces: give ddp"),
        ("--trainer.strategy=fsdp_cpu_offload", "give ddp"),
        ('--trainer.strategy={"class_path": "lightning.pytorch.strategies.FSDPStrategy"}', "strategy is FSDPStrategy"),
    ],
)  # fmt: skip
def test_what_casts_or_cuts_the_weights_is_one_line(tiny_cache, tmp_path, capsys, option, says):
    assert fit_here(tiny_cache, tmp_path / "run", *OPTIONS, option, "--trainer.max_steps=1") == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_mixed_precision_trains(tiny_cache, tmp_path, precision):
    run = tmp_path / "run"
    assert fit_here(tiny_cache, run, *OPTIONS, f"--trainer.precision={precision}", "--trainer.max_steps=2") == 0
    stored = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert {value.dtype for value in stored.values()} == {torch.float32}


def test_the_head_is_held_in_the_type_it_is_computed_in(tiny_cache, tmp_path, monkeypatch):
    """Autocast would cast it at every call, to the same numbers: loss and weights are bit for bit what they were."""
    held = []
    real = TargetVocabulary.hold_head_in
    monkeypatch.setattr(TargetVocabulary, "hold_head_in", lambda self, dtype: held.append(dtype) or real(self, dtype))
    options = (*OPTIONS, "--trainer.precision=bf16-mixed", "--trainer.max_steps=3")
    assert fit_here(tiny_cache, tmp_path / "held", *options) == 0
    assert held == [torch.bfloat16]
    monkeypatch.setattr(module, "COMPUTED_IN", {})
    assert fit_here(tiny_cache, tmp_path / "cast", *options) == 0
    assert held == [torch.bfloat16]
    assert logged(tmp_path / "held") == logged(tmp_path / "cast")
    one, two = (
        torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for name in ("held", "cast")
    )
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_scaler_leaves_out_steps_that_overflow_and_goes_on(tiny_cache, tmp_path):
    run = tmp_path / "run"
    options = (f"--trainer.plugins={__name__}.TooLargeAScale", "--trainer.max_steps=30", "--trainer.max_epochs=30")
    assert fit_here(tiny_cache, run, *OPTIONS, *options, "--model.optimizer.init_args.lr=3e-3") == 0
    norms, losses = logged(run, "train/grad_norm"), logged(run)
    assert not math.isfinite(norms[0])
    assert all(map(math.isfinite, [norms[step] for step in range(25, 30)]))
    assert all(map(math.isfinite, losses.values()))
    assert losses[29] < losses[0]
