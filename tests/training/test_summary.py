"""`summary.json`, and a line, say what a run came to, also when its command is repeated, and of validations alone."""

import errno
import json

import pytest

from specauf.checkpoint import load_checkpoint
from tests.training.running import fit_here, logged

OPTIONS = ("--model.loss=auf", "--model.schedule.class_path=specauf.schedules.Constant")


def summary(run):
    return json.loads((run / "summary.json").read_text())


@pytest.fixture(scope="module")
def ended(tiny_cache, tmp_path_factory):
    run = tmp_path_factory.mktemp("ended") / "run"
    assert fit_here(tiny_cache, run, *OPTIONS, "--trainer.max_epochs=1") == 0
    return run


@pytest.mark.parametrize("end", ["--trainer.max_epochs=1", "--trainer.max_steps=4"])
def test_repeating_the_command_of_a_finished_run_leaves_it_as_it_was(tiny_cache, ended, end):
    before = (ended / "summary.json").read_bytes()
    assert fit_here(tiny_cache, ended, *OPTIONS, end, f"--ckpt_path={ended}") == 0
    assert (ended / "summary.json").read_bytes() == before


def test_where_there_is_none_it_is_that_of_the_checkpoint(tiny_cache, tmp_path, ended):
    whole = summary(ended)
    assert fit_here(tiny_cache, tmp_path, *OPTIONS, "--trainer.max_epochs=1", f"--ckpt_path={ended}") == 0
    found = summary(tmp_path)
    for name in ("steps", "tau", "best_tau", "best_step", "loss"):
        assert found[name] == whole[name] is not None
    assert 0 < found["seconds"] <= whole["seconds"]


def test_a_full_disk_leaves_no_half_of_it(tiny_cache, tmp_path, monkeypatch, ended):
    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert fit_here(tiny_cache, tmp_path, *OPTIONS, "--trainer.max_epochs=1", f"--ckpt_path={ended}") == 2
    assert not list(tmp_path.glob("summary.json*"))


def test_a_run_that_goes_on_counts_what_went_before(tiny_cache, tmp_path, ended):
    assert fit_here(tiny_cache, tmp_path, *OPTIONS, "--trainer.max_epochs=2", f"--ckpt_path={ended}") == 0
    found = summary(tmp_path)
    assert found["steps"] == 8
    assert found["loss"] == pytest.approx(logged(tmp_path)[7])
    assert found["tau"] == pytest.approx(logged(tmp_path, "val/tau")[7])
    before = load_checkpoint(ended / "checkpoints/last.ckpt")["callbacks"]["Summary"]["seconds"]
    assert found["seconds"] > before > 0


def test_the_end_says_where_the_run_is_and_what_comes_next(tiny_cache, tmp_path, capsys):
    run, target = tmp_path / "run", "--target tiny/target"
    assert fit_here(tiny_cache, run, *OPTIONS, "--trainer.max_epochs=1", "--trainer.max_steps=40") == 0
    found = summary(run)
    tau = f"best tau {found['best_tau']:.3f} at step 4"
    assert capsys.readouterr().out.splitlines() == [
        f"{run}: 4 steps (trainer.max_epochs 1 came before max_steps 40), {tau}",
        f"  next: specauf evaluate {run} {target}",
    ]
    assert fit_here(tiny_cache, run, *OPTIONS, "--trainer.max_epochs=1", f"--ckpt_path={run}") == 0
    said = "nothing left to do after 4 steps; raise trainer.max_epochs or max_steps to go on"
    assert capsys.readouterr().out == f"{run}: {said}\n"
    options = ("--trainer.max_steps=2", "--trainer.limit_val_batches=0", f"--checkpoints.directory={tmp_path}/kept")
    assert fit_here(tiny_cache, tmp_path / "other", *OPTIONS, *options) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}/other: 2 steps",
        f"  next: specauf evaluate {tmp_path}/kept/last.ckpt {target}",
    ]


def test_a_sanity_check_is_no_validation(tiny_cache, tmp_path):
    still = ("--model.optimizer.init_args.lr=0.0", "--trainer.max_epochs=1", "--trainer.num_sanity_val_steps=2")
    assert fit_here(tiny_cache, tmp_path, *OPTIONS, *still) == 0
    found = summary(tmp_path)  # a rate of 0: equal taus, of which the first is the best
    assert found["best_step"] == 4
    assert found["tau"] == found["best_tau"]
