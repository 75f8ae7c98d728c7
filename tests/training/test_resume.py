"""A run that was stopped in mid-epoch goes on as if it had not been."""

import json

import pytest
import torch

from tests.training.conftest import write_tiny_cache
from tests.training.running import fit, fit_here, logged

STEPS, STOP = 11, 7  # 4 steps an epoch: the stop is in mid-epoch, the last save before it as well
STOPPED = f"""
import os, signal, sys
from specauf.callbacks import Throughput
from specauf.cli import main
end = Throughput.on_train_batch_end
def stop(self, trainer, *rest):
    end(self, trainer, *rest)
    if trainer.global_step == {STOP}:
        os.kill(os.getpid(), signal.SIGNAL)
Throughput.on_train_batch_end = stop
sys.exit(main())
"""
OPTIONS = ("--model.loss=auf-warmup", "--model.loss.weighting.warmup_steps=9", "--checkpoints.every_n_steps=3",
           f"--trainer.max_steps={STEPS}")  # fmt: skip
CONSTANT = "--model.schedule.class_path=specauf.schedules.Constant"  # does not depend on the run's length


@pytest.fixture(scope="module")
def unbroken(tiny_cache, tmp_path_factory):
    run = tmp_path_factory.mktemp("unbroken")
    assert fit_here(tiny_cache, run, *OPTIONS) == 0
    return run


def weights(run, name="last"):
    return torch.load(run / f"checkpoints/{name}.ckpt", weights_only=True)["state_dict"]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("signal", "status", "saved"), [("SIGKILL", -9, 6), ("SIGTERM", 143, STOP)])
def test_the_remaining_losses_are_those_of_the_unbroken_run(
    tiny_cache, tmp_path, unbroken, signal, status, saved, workers
):
    options = (*OPTIONS, f"--data.num_workers={workers}")
    stopped = fit(tiny_cache, tmp_path, *options, code=STOPPED.replace("SIGNAL", signal))
    assert stopped.returncode == status, stopped.stderr
    assert "Traceback" not in stopped.stderr
    last = tmp_path / "checkpoints/last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == saved
    assert not (tmp_path / "summary.json").exists()
    assert fit_here(tiny_cache, tmp_path, *options, f"--ckpt_path={last}") == 0
    for name in ("train/loss", "train/lr", "train/grad_norm", "train/support_ratio"):
        rest = {step: value for step, value in logged(unbroken, name).items() if step >= saved}
        assert logged(tmp_path, name) == rest
        assert len(rest) == STEPS - saved
    assert all(torch.equal(v, weights(unbroken)[k]) for k, v in weights(tmp_path).items())
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == STEPS


SAVING = """
import sys
from specauf.callbacks import Summary
from specauf.cli import main
start = Summary.on_train_batch_start
def save(self, trainer, *rest):
    start(self, trainer, *rest)
    if trainer.global_step in {}:
        trainer.save_checkpoint(f"{}/{{trainer.global_step}}.ckpt")
Summary.on_train_batch_start = save
sys.exit(main())
"""


MIDDLES = (6, 3, STEPS - 1)  # in mid-epoch; an epoch's last batch; the run's last


@pytest.fixture(scope="module")
def middles(tiny_cache, tmp_path_factory):
    """Checkpoints from the middle of batches, as Lightning writes them when SLURM's signal comes, or an exception."""
    folder = tmp_path_factory.mktemp("middles")
    saved = fit(tiny_cache, folder / "run", *OPTIONS, code=SAVING.format(MIDDLES, folder))
    assert saved.returncode == 0, saved.stderr
    return folder


@pytest.mark.parametrize("step", MIDDLES)
def test_a_checkpoint_from_the_middle_of_a_batch_goes_on_with_that_batch(tiny_cache, tmp_path, unbroken, middles, step):
    assert fit_here(tiny_cache, tmp_path / "rest", *OPTIONS, f"--ckpt_path={middles / f'{step}.ckpt'}") == 0
    assert list(logged(tmp_path / "rest").values()) == [value for n, value in logged(unbroken).items() if n >= step]
    assert all(torch.equal(v, weights(unbroken)[k]) for k, v in weights(tmp_path / "rest").items())
    assert json.loads((tmp_path / "rest/summary.json").read_text())["steps"] == STEPS


def test_early_stopping_as_lightning_does_it_goes_on(tiny_cache, tmp_path):
    """Behind a validation's checkpoint Lightning ends that epoch once more, where the callback looks at its metric."""
    stopping = ("--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/tau",
                "--trainer.callbacks.mode=max", "--trainer.callbacks.patience=50")  # fmt: skip
    options = ("--model.loss=auf", CONSTANT, *stopping)
    assert fit_here(tiny_cache, tmp_path / "whole", *options, "--trainer.max_epochs=3") == 0
    assert fit_here(tiny_cache, tmp_path / "parts", *options, "--trainer.max_epochs=2") == 0
    resume = (*options, f"--ckpt_path={tmp_path}/parts", "--trainer.max_epochs=3")
    assert fit_here(tiny_cache, tmp_path / "parts", *resume) == 0
    files = [tmp_path / name / "checkpoints/last.ckpt" for name in ("whole", "parts")]
    one, two = (torch.load(file, weights_only=True) for file in files)
    assert all(torch.equal(v, two["state_dict"][k]) for k, v in one["state_dict"].items())
    states = [next(s for n, s in c["callbacks"].items() if n.startswith("EarlyStopping")) for c in (one, two)]
    assert states[0] == states[1]


SLURM = """
import os
os.environ |= dict(SLURM_NTASKS="1", SLURM_JOB_NAME="train", SLURM_JOB_ID="7", SLURM_JOB_NODELIST="localhost",
                   SLURM_LOCALID="0", SLURM_PROCID="0", SLURM_NODEID="0", SLURM_RESTART_COUNT="{}")
"""


def test_a_job_that_slurm_ends_and_starts_again_goes_on_by_itself(tiny_cache, tmp_path, unbroken):
    stopped = fit(tiny_cache, tmp_path, *OPTIONS, code=SLURM.format(0) + STOPPED.replace("SIGNAL", "SIGTERM"))
    assert stopped.returncode == 143, stopped.stderr
    again = fit(tiny_cache, tmp_path, *OPTIONS, code=SLURM.format(1) + "from specauf.cli import main; main()")
    assert again.returncode == 0, again.stderr
    assert logged(tmp_path) == {step: value for step, value in logged(unbroken).items() if step >= STOP}


@pytest.fixture(scope="module")
def unbroken_constant(tiny_cache, tmp_path_factory):
    run = tmp_path_factory.mktemp("constant")
    assert fit_here(tiny_cache, run, *OPTIONS, CONSTANT) == 0
    return run


@pytest.mark.parametrize("validation", ["1.0", "0"])
@pytest.mark.parametrize("steps", [4, 6])
def test_a_finished_run_can_be_made_longer(tiny_cache, tmp_path, unbroken_constant, steps, validation):
    constant, run = (CONSTANT, f"--trainer.limit_val_batches={validation}"), tmp_path / "parts"
    assert fit_here(tiny_cache, run, *OPTIONS, *constant, f"--trainer.max_steps={steps}") == 0
    resume = (*OPTIONS, *constant, f"--ckpt_path={run}/checkpoints/last.ckpt")
    assert fit_here(tiny_cache, run, *resume) == 0
    rest = [value for step, value in logged(unbroken_constant).items() if step >= steps]
    assert list(logged(run).values()) == rest
    assert len(list(run.glob("metrics-*.csv"))) == 1


@pytest.fixture(
    scope="module",
    params=[("2", "1.0"), ("0.5", "0"), pytest.param(("3", "0"), marks=pytest.mark.slow)],
    ids=lambda param: param[0],
)
def unbroken_limited(request, tiny_cache, tmp_path_factory):
    """A run whose epochs are cut short, and what cuts them; the first validates after each."""
    run, (train, validation) = tmp_path_factory.mktemp("limited"), request.param
    options = (CONSTANT, f"--trainer.limit_train_batches={train}", f"--trainer.limit_val_batches={validation}")
    assert fit_here(tiny_cache, run, *OPTIONS, *options) == 0
    return run, options


@pytest.mark.parametrize("steps", [2, 3])
def test_a_run_of_cut_epochs_goes_on_with_the_same_batches(tiny_cache, tmp_path, unbroken_limited, steps):
    (unbroken, options), run = unbroken_limited, tmp_path / "parts"
    assert fit_here(tiny_cache, run, *OPTIONS, *options, f"--trainer.max_steps={steps}") == 0
    resume = (*OPTIONS, *options, f"--ckpt_path={run}/checkpoints/last.ckpt")
    assert fit_here(tiny_cache, run, *resume) == 0
    rest = [value for step, value in logged(unbroken).items() if step >= steps]
    assert list(logged(run).values()) == rest
    assert len(rest) == STEPS - steps


def without_limit(checkpoint, path):
    """A checkpoint as it was written before positions named the trainer's limit."""
    content = torch.load(checkpoint, weights_only=True)
    del content["CacheDataModule"]["position"]["trainer.limit_train_batches"]
    torch.save(content, path)
    return path


@pytest.mark.parametrize("limit", ["3", "4"])  # of 4 batches
def test_a_checkpoint_that_names_no_limit_goes_on_with_that_of_the_command(tiny_cache, tmp_path, limit):
    options = (*OPTIONS, CONSTANT, f"--trainer.limit_train_batches={limit}")
    for name, steps in (("whole", STEPS), ("part", 3)):
        assert fit_here(tiny_cache, tmp_path / name, *options, f"--trainer.max_steps={steps}") == 0
    old = without_limit(tmp_path / "part/checkpoints/last.ckpt", tmp_path / "old.ckpt")
    resume = (*options, f"--ckpt_path={old}", f"--trainer.max_steps={STEPS}")
    assert fit_here(tiny_cache, tmp_path / "rest", *resume) == 0
    rest = [value for step, value in logged(tmp_path / "whole").items() if step >= 3]
    assert list(logged(tmp_path / "rest").values()) == rest


def test_epochs_differ_in_order_and_anchors(unbroken):
    """With a rate of nearly nothing, equal batches would give equal losses."""
    losses = logged(unbroken)
    assert len({round(losses[step], 4) for step in range(STEPS)}) == STEPS


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--model.optimizer.init_args.lr=0.5"], "optimizer has lr 0.0006, model.optimizer gives 0.5"),
        (["--data.batch_size=2"], "data.batch_size 4, now 2"),
        (["--data.seed=5"], "data.seed 0, now 5"),
        (["--trainer.accumulate_grad_batches=2"], "accumulate_grad_batches 1, now 2"),
        # Not 1: in a process that has parsed 1.0 before, jsonargparse's memory makes that of it.
        (["--trainer.limit_train_batches=2"], "trainer.limit_train_batches None, now 2"),
        (["--model.drafter.num_hidden_layers=1"], "num_hidden_layers 2, model.drafter gives 1"),
        (["--model.drafter=domino"], "its drafter has drafter dflash, model.drafter gives domino"),
        (["--model.optimizer=torch.optim.Adamax"], "its optimizer has "),
    ],
)
def test_nothing_is_silently_replaced_by_the_checkpoint(tiny_cache, tmp_path, unbroken, capsys, options, says):
    resume = (*OPTIONS, *options, f"--ckpt_path={unbroken}/checkpoints/last.ckpt", "--trainer.max_steps=12")
    assert fit_here(tiny_cache, tmp_path, *resume) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1


def test_another_cache_is_refused(tmp_path, unbroken, capsys):
    other = write_tiny_cache(tmp_path / "other", documents=16, corpus={"name": "another"})
    assert fit_here(other, tmp_path / "run", *OPTIONS, f"--ckpt_path={unbroken}/checkpoints/last.ckpt") == 2
    err = capsys.readouterr().err
    assert "its run read the cache" in err
    assert err.count("\n") == 1


def test_a_damaged_checkpoint_is_one_line(tiny_cache, tmp_path, unbroken, capsys):
    broken = tmp_path / "broken.ckpt"
    broken.write_bytes((unbroken / "checkpoints/last.ckpt").read_bytes()[:1000])
    assert fit_here(tiny_cache, tmp_path / "run", *OPTIONS, f"--ckpt_path={broken}") == 2
    err = capsys.readouterr().err
    assert "broken.ckpt" in err
    assert err.count("\n") == 1
    assert fit_here(tiny_cache, tmp_path / "run", *OPTIONS, f"--ckpt_path={tmp_path}/none.ckpt") == 2
    assert "none.ckpt" in capsys.readouterr().err
