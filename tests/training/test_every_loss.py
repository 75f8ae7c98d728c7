"""Every file in configs/loss/ trains by the command line."""

import pytest

from specauf.configs import known_configs
from tests.training.running import fit_here, logged


@pytest.mark.slow
@pytest.mark.parametrize("loss", known_configs("loss"))
def test_every_loss_trains(tiny_cache, tmp_path, loss):
    options = (f"--model.loss={loss}", "--trainer.max_steps=3", "--trainer.limit_val_batches=0")
    assert fit_here(tiny_cache, tmp_path / "run", *options) == 0
    assert sorted(logged(tmp_path / "run")) == [0, 1, 2]
