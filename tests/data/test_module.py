"""The data module's own refusals, each in one line, and its order where `fit` is called from Python."""

import lightning as L
import pytest

from specauf.cache import Cache
from specauf.data.module import CacheDataModule
from specauf.drafters import DFlashSpec
from specauf.module import DrafterModule
from specauf.objectives import AcceptUntilFail, CrossEntropy, Objective
from specauf.schedules import Constant
from tests.training.conftest import tiny_cache, write_tiny_cache  # noqa: F401 -- a fixture
from tests.training.running import fit_here


def said(capsys):
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


def test_a_negative_seed(tiny_cache, tmp_path, capsys):  # noqa: F811
    assert fit_here(tiny_cache, tmp_path, "--model.loss=auf", "--data.seed=-1") == 2
    assert "data.seed is -1: give at least 0" in said(capsys)


def test_a_cache_with_nothing_to_validate_on(tmp_path, capsys):
    cache = write_tiny_cache(tmp_path / "cache", documents=3, per_shard=3)  # every fourth would be held out
    options = ("--model.loss=auf", "--trainer.max_steps=1", "--data.batch_size=2")
    for first in (1, 2):  # it is not found after the epochs before
        run = tmp_path / f"run-{first}"
        assert fit_here(cache, run, *options, f"--trainer.check_val_every_n_epoch={first}") == 2
        line = said(capsys)
        assert "has 3 documents, none of them held out to validate on" in line
        assert "--held_out" in line
        assert not (run / "config.yaml").exists()
    for offered in ("--data.validate_on=train", "--trainer.limit_val_batches=0"):
        assert offered in line
        assert fit_here(cache, tmp_path / offered, *options, offered) == 0


def test_validation_looks_for_no_more_documents_than_it_wants(tiny_cache, tmp_path, monkeypatch):  # noqa: F811
    looked, masks = [], Cache.loss_masks

    def counted(self, split=None):
        for shard in masks(self, split):
            looked.append(split)
            yield shard

    monkeypatch.setattr(Cache, "loss_masks", counted)
    options = ("--model.loss=auf", "--trainer.max_steps=1", "--data.validation_documents=2")
    assert fit_here(tiny_cache, tmp_path / "run", *options) == 0  # three shards of eight, two of which are held out
    assert looked.count("held_out") == 1
    assert looked.count("train") == 3


@pytest.mark.parametrize(
    ("option", "instead"),
    [
        ("--trainer.overfit_batches=1", "out and give -c configs/debug/overfit.yaml"),
        ("--trainer.reload_dataloaders_every_n_epochs=1", "each epoch is shuffled anew"),
    ],
)
def test_options_under_which_batches_are_not_what_they_promise(tiny_cache, tmp_path, capsys, option, instead):  # noqa: F811
    assert fit_here(tiny_cache, tmp_path, "--model.loss=auf", option) == 2
    line = said(capsys)
    assert option.removeprefix("--").replace("=", " is ") in line
    assert instead in line


class Seen(L.Callback):
    """The documents and anchors of each batch."""

    def __init__(self) -> None:
        self.batches = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.batches.append((batch.doc_ids, batch.anchors.tolist()))


@pytest.mark.filterwarnings("ignore")  # Lightning's advice
def test_a_second_fit_goes_on_with_the_next_epoch(tiny_cache, tmp_path):  # noqa: F811
    def fitted(*ends):
        module = DrafterModule(
            Objective(AcceptUntilFail(), CrossEntropy()), DFlashSpec(block_size=4), schedule=Constant()
        )
        data, seen = CacheDataModule(str(tiny_cache), batch_size=8), Seen()
        trainer = L.Trainer(
            accelerator="cpu", default_root_dir=tmp_path, logger=False, callbacks=[seen], limit_val_batches=0,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, max_epochs=ends[0],
        )  # fmt: skip
        for end in ends:
            trainer.fit_loop.max_epochs = end
            trainer.fit(module, data)
        return seen.batches

    whole = fitted(3)
    assert len(whole) == 6
    assert fitted(1, 3) == whole
