"""A number that is none and a full disk end a run in one line that says where; the last checkpoint stays whole."""

import re
import resource

import torch

import specauf.module
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
        f"import resource, sys; from specauf.cli import main; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, -1)); "
        "sys.exit(main())"
    )
    resumed = f"--ckpt_path={run / 'checkpoints/last.ckpt'}"
    done = fit(tiny_cache, run, *OPTIONS, resumed, code=full)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "writing failed (File too large); the last checkpoint is whole" in errors[0]
    assert (run / "checkpoints/last.ckpt").read_bytes() == before
    assert fit_here(tiny_cache, run, *OPTIONS, resumed) == 0
    assert last_of(run)["global_step"] == 12
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY  # the limit was that process's
