"""A drafter trained on the cache's sketch of the features serves raw ones, and a served one can go on from a sketch."""

from pathlib import Path

import pytest
import torch

from specauf.cache import open_cache
from specauf.checkpoint import load_drafter
from specauf.cli import main
from specauf.drafters import DFlashDrafter, sketch_of
from tests.drafters.tiny import batch_of, document, tiny_dflash, tiny_target, vocabulary_of
from tests.training.conftest import write_tiny_cache
from tests.training.running import arguments

RANK = 12


@pytest.mark.filterwarnings("ignore")  # Lightning's; a process of its own would take seconds
def test_a_run_on_a_sketch_loads_with_the_sketch_folded_in(tmp_path: Path):
    cache = write_tiny_cache(tmp_path / "cache", documents=8, features="sketch", sketch_rank=RANK)
    options = ("--model.loss=auf", "--trainer.max_steps=2", "--trainer.limit_val_batches=0")
    assert main(arguments(cache, tmp_path / "run", *options)) == 0
    stored = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert (stored["specauf"]["format"], stored["specauf"]["drafter"]) == (1, "dflash")
    drafter = load_drafter(tmp_path / "run")
    assert isinstance(drafter, DFlashDrafter)
    assert drafter.servable
    narrow = stored["state_dict"]["drafter.fc.weight"]
    assert narrow.shape[1] == RANK
    d = open_cache(str(cache)).document(0)
    # The reconstruction of a sketch has that sketch again.
    wide = drafter.fc(torch.from_numpy(d.features))
    torch.testing.assert_close(wide, torch.from_numpy(d.sketch) @ narrow.T, atol=1e-4, rtol=1e-4)


def test_a_cache_without_a_sketch_has_nothing_to_fold(tiny_cache: Path):
    assert sketch_of(open_cache(str(tiny_cache)).target) is None


def test_taking_a_sketch_out_of_fc_and_folding_it_back_keeps_what_the_sketch_keeps():
    target = tiny_target()
    basis, scale = torch.linalg.qr(torch.randn(64, 10)).Q, torch.rand(64) + 0.5
    sketch = {"basis": basis, "scale": scale}
    drafter, vocabulary = tiny_dflash(target), vocabulary_of(target)
    batch = batch_of([document(target, 5, 12, 1)], [[5, 8]])
    assert batch.features is not None
    y = batch.features / scale @ basis
    kept = y @ basis.T * scale
    narrow = drafter.unfold_sketch(sketch)
    assert narrow.config.feature_dim == 10
    for one, given in ((narrow, y), (narrow.fold_sketch(sketch), kept)):
        other = type(batch)(**(batch.__dict__ | {"features": given}))
        expected = type(batch)(**(batch.__dict__ | {"features": kept}))
        torch.testing.assert_close(one(other, vocabulary), drafter(expected, vocabulary), atol=1e-4, rtol=0)
