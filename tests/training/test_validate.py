"""`specauf validate` on other caches: of the same target any corpus and any sketch, of another target none."""

import pytest
import torch
import yaml

import specauf.module
from specauf.cache import open_cache
from specauf.checkpoint import load_drafter
from tests.training.conftest import write_tiny_cache
from tests.training.running import fit_here, validate_here

RANK = 12
SKETCH = {"features": "sketch", "sketch_rank": RANK, "documents": 12}
OTHER = {"id": "tiny/other", "fingerprint": "11ee"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("validate")
    cache = write_tiny_cache(folder / "cache", **SKETCH)
    assert fit_here(cache, folder / "run", "--model.loss=auf", "--trainer.max_steps=2") == 0
    return folder / "run"


@pytest.fixture
def validated(monkeypatch):
    """The drafters that validated."""
    seen, replay = [], specauf.module.replay

    def spied(drafter, *rest, **more):
        seen.append(drafter)
        return replay(drafter, *rest, **more)

    monkeypatch.setattr(specauf.module, "replay", spied)
    return seen


def narrow(run):
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]["drafter.fc.weight"]


def test_another_corpus_of_the_same_target_and_sketch(tmp_path, run, validated, capsys):
    other = write_tiny_cache(tmp_path / "other", **SKETCH, corpus={"name": "another"})
    before = yaml.safe_load((run / "config.yaml").read_text())
    assert open_cache(str(other)).fingerprint != open_cache(before["data"]["cache"]).fingerprint
    for cache in (before["data"]["cache"], other):
        assert validate_here(cache, run) == 0
        assert "val/tau" in capsys.readouterr().out
        assert torch.equal(validated[-1].fc.weight, narrow(run))


@pytest.mark.parametrize(
    "stored",
    [
        SKETCH | {"documents": 24},
        SKETCH | {"sketch_rank": 8},
        {"features": "int8", "sketch_rank": 0, "documents": 12},
    ],
    ids=["another-basis", "another-rank", "no-sketch"],
)
def test_what_another_cache_keeps_of_the_features_reads_as_it_is_served(tmp_path, run, validated, stored):
    cache = write_tiny_cache(tmp_path / "other", **stored)
    assert validate_here(cache, run) == 0
    (drafter,) = validated
    document = open_cache(str(cache)).document(0)
    given = document.features if document.sketch is None else document.sketch
    expected = load_drafter(run).fc(torch.from_numpy(document.features))
    torch.testing.assert_close(drafter.fc(torch.from_numpy(given)), expected, atol=1e-4, rtol=1e-4)
    if document.sketch is not None and given.shape[1] == RANK:
        wrong = torch.from_numpy(given) @ narrow(run).T
        assert (wrong - expected).norm() > 0.1 * expected.norm()


def refused(capsys, *expected):
    err = capsys.readouterr().err
    assert all(part in err for part in expected), err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_another_target_is_refused(tmp_path, run, capsys):
    other = write_tiny_cache(tmp_path / "other", **SKETCH, target=OTHER)
    assert validate_here(other, run) == 2
    refused(capsys, "is of the target tiny/other 11ee", "for tiny/target 00ff: give the cache it was trained on")


@pytest.mark.parametrize("more", [{}, {"checksum": "11"}], ids=["alike", "with a checksum, which the run has not"])
def test_another_name_of_the_same_weights_is_not(more, tmp_path, run):
    renamed = write_tiny_cache(tmp_path / "other", **SKETCH, target={"id": "mine", "fingerprint": "00ff"} | more)
    assert validate_here(renamed, run) == 0


def test_another_shape_is_refused(run, capsys):
    own = yaml.safe_load((run / "config.yaml").read_text())["data"]["cache"]
    assert validate_here(own, run, "--model.drafter.init_args.num_hidden_layers=1") == 2
    refused(capsys, "its drafter has num_hidden_layers 2, model.drafter and data.cache give 1", "run's own config.yaml")
    assert validate_here(own, run, "--model.drafter=masked") == 2
    refused(capsys, "its drafter has drafter dflash, model.drafter and data.cache give masked")


def test_a_checkpoint_that_names_no_target_is_validated_on_its_own_cache_alone(tmp_path, run, capsys):
    checkpoint = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    del checkpoint["specauf"]["target"]
    torch.save(checkpoint, tmp_path / "early.ckpt")
    early = f"--ckpt_path={tmp_path}/early.ckpt"
    own = yaml.safe_load((run / "config.yaml").read_text())["data"]["cache"]
    assert validate_here(own, run, early) == 0
    other = write_tiny_cache(tmp_path / "other", **SKETCH, corpus={"name": "another"})
    capsys.readouterr()
    assert validate_here(other, run, early) == 2
    refused(capsys, "a target it does not name: give the cache it was trained on")
