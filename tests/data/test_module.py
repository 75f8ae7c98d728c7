"""The data module's own refusals, each in one line."""

import pytest

from specauf.cache import Cache
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
    assert fit_here(cache, tmp_path / "run", *options) == 2
    line = said(capsys)
    assert "has 3 documents, none of them held out to validate on" in line
    assert "--held_out" in line
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
