"""A number that is none, a full disk and a kill while it saves end a run; the last checkpoint stays whole."""

import re
import resource
import signal
from pathlib import Path

import pytest
import torch

import specauf.module
from specauf.checkpoint_io import WholeCheckpointIO
from tests.processes import forked, limit_files
from tests.training.running import fit, fit_here

# 4 steps an epoch: `last.ckpt` is of step 6 when step 8 goes wrong.
OPTIONS = ("--model.loss=auf", "--trainer.max_epochs=3", "--trainer.limit_val_batches=0",
           "--checkpoints.every_n_steps=3")  # fmt: skip


def last_of(run):
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True)


def test_a_nan_names_batch_and_documents_and_the_last_checkpoint_is_from_before(
    tiny_cache, tmp_path, monkeypatch, capsys
):
    losses = specauf.module.branch_losses

    def poisoned(branches, *rest, step, **more):
        if step == 7:
            for branch in branches:
                branch.rows.data.fill_(torch.nan)
        return losses(branches, *rest, step=step, **more)

    monkeypatch.setattr(specauf.module, "branch_losses", poisoned)
    assert fit_here(tiny_cache, tmp_path / "run", *OPTIONS) == 2
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(err) == 1
    assert re.search(r"the loss is nan at step 7, batch 3, documents \d+(, \d+)+: lower ", err[0])
    last = last_of(tmp_path / "run")
    assert last["global_step"] == 6
    assert all(torch.isfinite(value).all() for value in last["state_dict"].values())


def test_a_disk_that_fills_up_leaves_the_last_checkpoint_whole(tiny_cache, tmp_path):
    run = tmp_path / "run"
    assert fit_here(tiny_cache, run, "--trainer.max_steps=6", *OPTIONS) == 0
    before = (run / "checkpoints/last.ckpt").read_bytes()
    size = len(before) // 2
    full = (
        f"import sys; from specauf.cli import main; from tests.processes import limit_files; limit_files({size}); "
        "sys.exit(main())"
    )
    resumed = f"--ckpt_path={run / 'checkpoints/last.ckpt'}"
    done = fit(tiny_cache, run, *OPTIONS, resumed, code=full)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "writing failed (File too large); a checkpoint that was there is whole" in errors[0]
    assert (run / "checkpoints/last.ckpt").read_bytes() == before
    assert fit_here(tiny_cache, run, *OPTIONS, resumed) == 0
    assert last_of(run)["global_step"] == 12
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY  # the limit was that process's


# The third checkpoint's bytes are all written, but not yet in their place: each is synced, and then its directory.
KILLED = """
import os, signal, sys
from specauf.cli import main
times, fsync = [], os.fsync
def killed(file):
    fsync(file)
    times.append(file)
    if len(times) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
os.fsync = killed
sys.exit(main())
"""


def test_a_kill_while_it_saves_leaves_the_checkpoint_before(tiny_cache, tmp_path):
    run = tmp_path / "run"
    # Saved at 3, 4 (the epoch's end), 6.
    assert fit(tiny_cache, run, *OPTIONS, code=KILLED).returncode == -signal.SIGKILL
    files = sorted(file.name for file in (run / "checkpoints").iterdir())
    assert re.fullmatch(r"last\.ckpt last\.ckpt\.specauf-tmp-\d+", " ".join(files))
    assert last_of(run)["global_step"] == 4
    assert fit_here(tiny_cache, run, *OPTIONS, f"--ckpt_path={run}") == 0
    assert [file.name for file in (run / "checkpoints").iterdir()] == ["last.ckpt"]
    assert last_of(run)["global_step"] == 12


def save_to_a_full_disk(file: str) -> None:
    limit_files(1000)
    WholeCheckpointIO().save_checkpoint({"weights": torch.ones(5000)}, file)


def test_saving_touches_the_checkpoint_s_own_directory_alone(tmp_path, monkeypatch):
    """Where TMPDIR is on another file system, what is made there is copied over the checkpoint, not moved."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "nowhere"))
    monkeypatch.setattr("tempfile.tempdir", None)
    file, writer = tmp_path / "checkpoints" / "last.ckpt", WholeCheckpointIO()
    for step in (1, 2):
        writer.save_checkpoint({"global_step": step}, file)
        assert torch.load(file, weights_only=True) == {"global_step": step}
        assert [found.name for found in file.parent.iterdir()] == ["last.ckpt"]
    before = file.read_bytes()
    monkeypatch.undo()
    done = forked(save_to_a_full_disk, str(file))
    assert "File too large" in done.stderr
    assert file.read_bytes() == before
    assert [found.name for found in file.parent.iterdir()] == ["last.ckpt"]
    with pytest.raises(TypeError, match="storage_options"):
        writer.save_checkpoint({}, file, storage_options={})


def test_every_checkpoint_of_a_run_is_saved_so(tiny_cache, tmp_path, monkeypatch):
    saved, real = [], WholeCheckpointIO.save_checkpoint
    monkeypatch.setattr(
        WholeCheckpointIO, "save_checkpoint", lambda io, c, path, **rest: saved.append(path) or real(io, c, path)
    )
    assert fit_here(tiny_cache, tmp_path / "run", "--model.loss=auf", "--trainer.max_epochs=1") == 0
    assert {Path(path).name for path in saved} == {"best.ckpt", "last.ckpt"}
