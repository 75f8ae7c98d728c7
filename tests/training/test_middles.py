"""Checkpoints from the middle of a batch or of an accumulated step: a signal's, an exception's, a clock's."""

import os
import signal

import lightning as L
import pytest
import torch

from specauf.callbacks import Throughput
from tests.training.running import fit_here, logged

# 4 batches an epoch.
OPTIONS = ("--model.loss=auf", "--model.schedule.class_path=specauf.schedules.Constant",
           "--model.optimizer.init_args.lr=1.0e-2")  # fmt: skip
VALIDATED = ("--trainer.max_epochs=2", "--trainer.val_check_interval=2")
HALVES = ("--trainer.accumulate_grad_batches=2", "--trainer.max_steps=4")
ODD = (*HALVES, "--trainer.limit_train_batches=3", "--trainer.limit_val_batches=0")  # steps of 2 batches and of 1


class Saves(L.Callback):
    """Saves before and behind each batch, into a directory beside the run's."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self._save(trainer, batch_idx, "start")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self._save(trainer, batch_idx, "end")

    def _save(self, trainer, batch_idx, what) -> None:
        trainer.save_checkpoint(f"{trainer.default_root_dir}-saved/{trainer.current_epoch}-{batch_idx}-{what}.ckpt")


def last(run, key="state_dict"):
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True)[key]


@pytest.fixture(scope="module")
def unbroken(request, tiny_cache, tmp_path_factory):
    """A whole run, and what it was trained with beside OPTIONS."""
    run = tmp_path_factory.mktemp("unbroken") / "run"
    assert fit_here(tiny_cache, run, *OPTIONS, *request.param, f"--trainer.callbacks+={__name__}.Saves") == 0
    return run, request.param


def goes_on_as(whole, run, step):
    for name in ("train/loss", "train/grad_norm", "val/tau"):
        assert logged(run, name) == {n: value for n, value in logged(whole, name).items() if n >= step}
    assert all(torch.equal(value, last(run)[name]) for name, value in last(whole).items())


@pytest.mark.parametrize(
    ("unbroken", "saved"),
    [
        (VALIDATED, ("0-0-start", "0-2-start", "1-0-start", "1-3-start")),
        (HALVES, ("0-0-end", "0-1-start", "0-2-end", "1-1-start")),
        (ODD, ("0-2-start", "1-0-start", "1-0-end", "1-2-start")),
    ],
    ids=["batches", "halves", "odd"],
    indirect=["unbroken"],
)
def test_it_goes_on_as_the_unbroken_run(tiny_cache, tmp_path, unbroken, saved):
    whole, options = unbroken
    for name in saved:
        file = whole.parent / f"run-saved/{name}.ckpt"
        assert fit_here(tiny_cache, tmp_path / name, *OPTIONS, *options, f"--ckpt_path={file}") == 0
        goes_on_as(whole, tmp_path / name, torch.load(file, weights_only=True)["global_step"])


@pytest.mark.parametrize("unbroken", [HALVES], indirect=True)
def test_sigterm_in_the_middle_of_a_step_loses_no_step(tiny_cache, tmp_path, monkeypatch, unbroken):
    (whole, options), end = unbroken, Throughput.on_train_batch_end

    def stop(self, trainer, pl_module, outputs, batch, batch_idx):
        end(self, trainer, pl_module, outputs, batch, batch_idx)
        if (trainer.global_step, batch_idx) == (1, 2):
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(Throughput, "on_train_batch_end", stop)
        with pytest.raises(SystemExit) as ended:
            fit_here(tiny_cache, tmp_path / "run", *OPTIONS, *options)
    assert ended.value.code == 143
    assert last(tmp_path / "run", "global_step") == 1
    assert fit_here(tiny_cache, tmp_path / "run", *OPTIONS, *options, f"--ckpt_path={tmp_path}/run") == 0
    goes_on_as(whole, tmp_path / "run", 1)


class SavesInStep(L.Callback):
    """Saves when the optimizer has changed the weights of step 2, whose batch is not done."""

    def on_train_start(self, trainer, pl_module) -> None:
        def save(*rest):
            if trainer.global_step == 2:
                trainer.save_checkpoint(f"{trainer.default_root_dir}-saved/step.ckpt")

        trainer.optimizers[0].register_step_post_hook(save)


def test_one_from_the_middle_of_the_optimizer_s_work_is_refused(tiny_cache, tmp_path, capsys):
    options, saves = (*OPTIONS, "--trainer.max_steps=3"), f"--trainer.callbacks+={__name__}.SavesInStep"
    assert fit_here(tiny_cache, tmp_path / "run", *options, saves) == 0
    capsys.readouterr()
    assert fit_here(tiny_cache, tmp_path / "rest", *options, f"--ckpt_path={tmp_path}/run-saved/step.ckpt") == 2
    assert "written while the optimizer changed the weights" in capsys.readouterr().err
