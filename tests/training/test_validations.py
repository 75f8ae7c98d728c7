"""A run that ends in the middle of a validation makes it up when it goes on, and what it keeps are trained weights."""

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

import specauf.callbacks
import specauf.module
from specauf.checkpoint import load_checkpoint
from tests.training.running import fit_here, logged, validate_here

EMA = ("-c", "configs/trainer/ema.yaml")
# 4 steps an epoch, whose rate does not depend on the run's length.
OPTIONS = ("--model.loss=auf", "--model.schedule.class_path=specauf.schedules.Constant", "--trainer.max_epochs=2",
           "--model.optimizer.init_args.lr=1.0e-2")  # fmt: skip
EVERY_2 = "--trainer.val_check_interval=2"
EVERY_3 = "--trainer.val_check_interval=3"


class StopsAfter3(L.Callback):
    """Ends a run as its time limit does."""

    def on_train_batch_end(self, trainer, *rest) -> None:
        trainer.should_stop = trainer.global_step == 3


def last(run, key="state_dict"):
    return load_checkpoint(run / "checkpoints/last.ckpt")[key]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture(scope="module")
def unbroken(request, tiny_cache, tmp_path_factory):
    """A whole run, and what it was trained with beside OPTIONS."""
    run = tmp_path_factory.mktemp("unbroken")
    assert fit_here(tiny_cache, run, *OPTIONS, EVERY_2, *request.param) == 0
    return run, request.param


@pytest.mark.parametrize(
    ("unbroken", "stop", "length"),
    [
        ((), 2, ()),
        ((), 4, ()),
        ((), 6, ("--trainer.max_steps=6",)),
        pytest.param((), 8, (), marks=pytest.mark.slow),
        (EMA, 2, ()),
        pytest.param(EMA, 6, ("--trainer.max_steps=6",), marks=pytest.mark.slow),
    ],
    ids=["mid-epoch", "epoch-end", "last-step", "last-epoch", "averaged", "averaged-last-step"],
    indirect=["unbroken"],
)
def test_a_validation_that_was_cut_short_is_made_up(tiny_cache, tmp_path, monkeypatch, unbroken, stop, length):
    (whole, weights), run = unbroken, tmp_path / "run"
    options = (*OPTIONS, EVERY_2, *weights, *length)
    step = specauf.module.DrafterModule.validation_step

    def stopped(self, *rest):
        step(self, *rest)
        if self.global_step == stop:
            raise SIGTERMException  # as Lightning does behind the batch during which the signal came

    with monkeypatch.context() as patched:
        patched.setattr(specauf.module.DrafterModule, "validation_step", stopped)
        with pytest.raises(SystemExit) as ended:
            fit_here(tiny_cache, run, *options)
    assert ended.value.code == 143
    assert last(run, "global_step") == stop
    before = logged(run, "val/tau") if stop > 2 else {}
    assert fit_here(tiny_cache, run, *options, f"--ckpt_path={run}/checkpoints/last.ckpt") == 0
    end = 6 if length else 8
    assert before | logged(run, "val/tau") == {k: v for k, v in logged(whole, "val/tau").items() if k < end}
    if stop < end:
        assert logged(run) == {k: v for k, v in logged(whole).items() if k >= stop}
    if not length:
        assert same(last(run), last(whole))
        if weights:
            assert same(last(run, "current_model_state"), last(whole, "current_model_state"))
        best = [load_checkpoint(folder / "checkpoints/best.ckpt") for folder in (run, whole)]
        assert best[0]["global_step"] == best[1]["global_step"]
        assert same(best[0]["state_dict"], best[1]["state_dict"])
    assert (run / "checkpoints/best.ckpt").is_file()


def test_a_checkpoint_just_before_a_validation_goes_on_with_it(tiny_cache, tmp_path):
    saves = {"every_n_train_steps": 2, "save_top_k": -1, "dirpath": tmp_path / "own", "filename": "{step}"}
    own = ["--trainer.callbacks+=ModelCheckpoint", *(f"--trainer.callbacks.{k}={v}" for k, v in saves.items())]
    options, whole = (*OPTIONS, EVERY_2, *own), tmp_path / "whole"
    assert fit_here(tiny_cache, whole, *options) == 0
    for step in (2, 4, 8):
        run = tmp_path / f"from-{step}"
        assert fit_here(tiny_cache, run, *options, f"--ckpt_path={tmp_path}/own/step={step}.ckpt") == 0
        assert logged(run, "val/tau") == {k: v for k, v in logged(whole, "val/tau").items() if k >= step - 1}
        assert same(last(run), last(whole))


@pytest.mark.parametrize(
    "validated",
    [(EVERY_3,), ("--trainer.val_check_interval=6", "--trainer.check_val_every_n_epoch=null")],
    ids=["in-the-epoch", "across-epochs"],
)
def test_the_end_of_an_epoch_without_validation_is_saved_and_goes_on(tiny_cache, tmp_path, monkeypatch, validated):
    run, options = tmp_path / "parts", (*OPTIONS, *validated)
    assert fit_here(tiny_cache, tmp_path / "whole", *options) == 0

    def crash(self, trainer, *rest):
        if trainer.global_step == 5:
            raise RuntimeError("crash")

    with monkeypatch.context() as patched:
        patched.setattr(specauf.callbacks.Throughput, "on_train_batch_start", crash)
        with pytest.raises(RuntimeError, match="crash"):
            fit_here(tiny_cache, run, *options)
    assert last(run, "global_step") == 4
    assert fit_here(tiny_cache, run, *options, f"--ckpt_path={run}") == 0
    for name in ("train/loss", "val/tau"):
        assert logged(run, name) == {k: v for k, v in logged(tmp_path / "whole", name).items() if k >= 4}
    assert same(last(run), last(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("end", "steps"),
    [
        ((EVERY_3, "--trainer.max_epochs=1"), 4),
        ((f"--trainer.callbacks+={__name__}.StopsAfter3", "--trainer.limit_val_batches=0"), 3),
    ],
    ids=["epoch", "time"],
)
def test_the_end_keeps_the_trained_weights_beside_their_average(tiny_cache, tmp_path, capsys, end, steps):
    for name, preset in (("plain", ()), ("ema", EMA)):
        assert fit_here(tiny_cache, tmp_path / name, *OPTIONS, *end, *preset) == 0
        assert last(tmp_path / name, "global_step") == steps
    assert same(last(tmp_path / "ema", "current_model_state"), last(tmp_path / "plain"))
    assert not same(last(tmp_path / "ema"), last(tmp_path / "plain"))
    assert fit_here(tiny_cache, tmp_path / "ema", *OPTIONS, f"--ckpt_path={tmp_path}/ema") == 2
    assert "its run averages weights, trainer.callbacks has nothing that does" in capsys.readouterr().err
    assert validate_here(tiny_cache, tmp_path / "ema", "--trainer.limit_val_batches=1.0") == 0
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (["--trainer.val_check_interval=3"], "every 3 batches"),
        (["--trainer.val_check_interval=0.3"], "every 1 batches"),
        (["--trainer.val_check_interval=00:00:00:05"], "a time"),
        (
            [
                "--trainer.val_check_interval=2",
                "--trainer.check_val_every_n_epoch=null",
                "--trainer.limit_train_batches=3",
            ],
            "every 2 batches",
        ),
    ],
)
def test_a_validation_in_the_middle_of_a_step_is_refused(tiny_cache, tmp_path, capsys, options, found):
    accumulated = ("--trainer.accumulate_grad_batches=2", "--data.batch_size=4")
    assert fit_here(tiny_cache, tmp_path / "run", *OPTIONS, *accumulated, *options) == 2
    err = capsys.readouterr().err
    assert (
        f"trainer.val_check_interval is {found} but trainer.accumulate_grad_batches is 2: give a multiple of 2" in err
    )
    assert err.count("\n") == 1
    assert not {"config.yaml", "metrics.csv", "checkpoints"} & {path.name for path in (tmp_path / "run").iterdir()}


@pytest.mark.parametrize("options", [["--trainer.val_check_interval=2"], ["--trainer.limit_train_batches=3"]])
def test_one_between_two_steps_is_not(tiny_cache, tmp_path, options):
    accumulated = ("--trainer.accumulate_grad_batches=2", "--trainer.max_epochs=1")
    assert fit_here(tiny_cache, tmp_path, *OPTIONS, *accumulated, *options) == 0
    assert logged(tmp_path, "val/tau")
