"""torch.compile on the drafter's layers: the same numbers, no graph break, no new program for other lengths."""

import os
import subprocess
import sys

import pytest

from specauf.checkpoint import load_drafter
from tests.training.running import fit, logged


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dflash", "domino", "masked"])
def test_compiled_layers_give_the_same_and_are_compiled_once(kind: str):
    command = [sys.executable, "-m", "tests.drafters.compiled", kind]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "programs" in done.stdout


@pytest.mark.slow
def test_a_run_can_be_compiled(tiny_cache, tmp_path):
    losses = []
    for name, options in (("plain", ()), ("compiled", ("--model.compile=true",))):
        done = fit(tiny_cache, tmp_path / name, "--model.loss=auf", "--trainer.max_steps=3", *options)
        assert done.returncode == 0, done.stderr
        losses.append(logged(tmp_path / name))
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    assert load_drafter(tmp_path / "compiled").name == "dflash"
