"""A run's directory holds one run, whatever checkpoint or file a command names."""

import shutil

import pytest
import yaml

from specauf.checkpoint import load_checkpoint
from specauf.cli import main
from specauf.run_directory import new_run_directory, remove_empty
from tests.training.running import fit_here, logged

OPTIONS = ("--model.loss=auf", "--trainer.limit_val_batches=0",
           "--model.schedule.class_path=specauf.schedules.Constant")  # fmt: skip


@pytest.fixture(scope="module")
def ended(tiny_cache, tmp_path_factory):
    """A run of two steps."""
    run = tmp_path_factory.mktemp("ended") / "run"
    assert fit_here(tiny_cache, run, *OPTIONS, "--trainer.max_steps=2") == 0
    return run


def refused(capsys, *says):
    err = capsys.readouterr().err
    assert all(part in err for part in says), err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def content(run):
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_the_config_of_a_resumed_run_starts_a_new_one(tiny_cache, tmp_path, ended, capsys):
    run = tmp_path / "run"
    shutil.copytree(ended, run)
    assert fit_here(tiny_cache, run, *OPTIONS, "--trainer.max_steps=3", f"--ckpt_path={run}") == 0
    assert yaml.safe_load((run / "config.yaml").read_text())["ckpt_path"] is None
    words = ["fit", "-c", f"{run}/config.yaml"]
    assert main(words) == 2
    refused(capsys, "already holds a run")
    assert main([*words, f"--trainer.default_root_dir={tmp_path}/new"]) == 0
    assert sorted(logged(tmp_path / "new")) == [0, 1, 2]
    assert main(["validate", "-c", f"{run}/config.yaml", "--trainer.limit_val_batches=1.0"]) == 2
    refused(capsys, "no weights given")


def test_a_checkpoint_that_only_a_file_names_is_refused(tiny_cache, tmp_path, ended, capsys):
    file = tmp_path / "resumed.yaml"
    file.write_text(yaml.safe_dump({"ckpt_path": str(ended / "checkpoints/last.ckpt")}))
    words = (*OPTIONS, "--trainer.max_steps=3", "-c", str(file))
    assert fit_here(tiny_cache, tmp_path / "run", *words) == 2
    refused(capsys, "ckpt_path is ", " in a file: give it as --ckpt_path=", "or --ckpt_path=null for none")
    assert fit_here(tiny_cache, tmp_path / "run", *words, "--ckpt_path=null") == 0
    assert sorted(logged(tmp_path / "run")) == [0, 1, 2]


def test_another_run_does_not_go_on_in_its_place(tiny_cache, tmp_path, ended, capsys):
    other, kept = tmp_path / "other", tmp_path / "kept"
    assert fit_here(tiny_cache, other, *OPTIONS, "--trainer.max_steps=1") == 0
    elsewhere = f"--checkpoints.directory={kept}"
    assert fit_here(tiny_cache, tmp_path / "far", *OPTIONS, "--trainer.max_steps=1", elsewhere) == 0
    before = content(other) | content(kept)
    resume = (*OPTIONS, "--trainer.max_steps=3", f"--ckpt_path={ended}/checkpoints/last.ckpt")
    capsys.readouterr()
    assert fit_here(tiny_cache, other, *resume) == 2
    refused(capsys, f"run directory {other} already holds a run: go on with --ckpt_path={other}/checkpoints/last.ckpt")
    assert fit_here(tiny_cache, tmp_path / "new", *resume, elsewhere) == 2
    refused(capsys, f"checkpoints.directory {kept} already holds a run")
    assert content(other) | content(kept) == before
    assert fit_here(tiny_cache, tmp_path / "new", *resume) == 0
    assert load_checkpoint(tmp_path / "new/checkpoints/last.ckpt")["global_step"] == 3


def test_a_run_may_take_its_checkpoints_elsewhere(tiny_cache, tmp_path, ended):
    run = tmp_path / "run"
    shutil.copytree(ended, run)
    words = (f"--checkpoints.directory={tmp_path}/disk", f"--ckpt_path={run}/checkpoints/last.ckpt")
    assert fit_here(tiny_cache, run, *OPTIONS, "--trainer.max_steps=3", *words) == 0
    assert load_checkpoint(tmp_path / "disk/last.ckpt")["global_step"] == 3


def test_runs_that_begin_in_one_second_have_directories_of_their_own(tiny_cache, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPECAUF_RUN_DIRECTORY", "")  # so that it is put back
    assert new_run_directory() != new_run_directory()
    remove_empty()
    assert len(list(tmp_path.glob("runs/*"))) == 1
    # What is refused, or writes nothing, leaves none.
    words = ["-c", "fit", "--model.loss=auf", f"--data.cache={tiny_cache}", "--trainer.accelerator=cpu"]
    assert main(["fit", *words, "--trainer.limit_train_batches=0"]) == 2
    assert main(["fit", *words, "--trainer.fast_dev_run=1", "--data.batch_size=4"]) == 0
    assert len(list(tmp_path.glob("runs/*"))) == 1


@pytest.mark.parametrize("option", ["--trainer.default_root_dir=s3://bucket/run", "--checkpoints.directory=memory://a"])
def test_a_url_is_no_directory(tiny_cache, tmp_path, monkeypatch, capsys, option):
    monkeypatch.chdir(tmp_path)
    assert fit_here(tiny_cache, tmp_path / "run", *OPTIONS, option) == 2
    refused(capsys, option.removeprefix("--").replace("=", " is "))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"])
def test_a_command_that_is_started_again_by_its_scheduler_goes_on(tiny_cache, tmp_path, ended, monkeypatch, name):
    run = tmp_path / "run"
    shutil.copytree(ended, run)
    options = (*OPTIONS, "--trainer.max_steps=4")
    monkeypatch.setenv(name, "0")
    assert fit_here(tiny_cache, run, *options) == 2  # it is the first start, so this would be another run
    monkeypatch.setenv(name, "1")
    assert fit_here(tiny_cache, run, *options) == 0
    assert sorted(logged(run)) == [2, 3]
    figures = (run / "summary.json").read_text()
    assert fit_here(tiny_cache, run, *options) == 0
    assert (run / "summary.json").read_text() == figures
    assert fit_here(tiny_cache, tmp_path / "unbegun", *options) == 0
    assert sorted(logged(tmp_path / "unbegun")) == [0, 1, 2, 3]
