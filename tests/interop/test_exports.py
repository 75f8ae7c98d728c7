"""Exports in the hands of the packages that people load them with."""

import json
from pathlib import Path

import pytest
import torch

from specauf.drafters import TargetVocabulary
from specauf.export import TargetFacts, export_speculators, export_zlab
from specauf.targets import load_target, resolve_target
from tests.builder.conftest import make_target
from tests.drafters.tiny import tiny_dflash, tiny_drafter
from tests.interop.environments import run_in
from tests.interop.readers import Task, compare_decoding, decode_with

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def drafter():
    torch.manual_seed(0)
    return tiny_dflash(make_target(), taps=(1, 3, 5), mask_token_id=258, block_size=6)


@pytest.fixture(scope="module")
def zlab(drafter, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("zlab") / "drafter"
    export_zlab(drafter, folder, dtype=torch.float32)
    return folder


def test_zlab_package_decodes_an_export_cycle_for_cycle(drafter, zlab, target_directory, tmp_path):
    prompts = torch.randint(0, 256, (4, 9), generator=torch.Generator().manual_seed(1)).tolist()
    name = str(target_directory / "target.yaml")
    task = Task(load_target(resolve_target(name))[0], prompts, new=40)
    assert len(compare_decoding(task, drafter, decode_with("dflash", task, name, zlab, tmp_path))) > 20


def test_speculators_package_gives_our_logits(drafter, zlab, tmp_path):
    target = make_target()
    vocabulary = TargetVocabulary.from_target(target)
    facts = TargetFacts.from_config(target.config.to_dict(), "the tiny target", vocabulary=vocabulary)
    export_speculators(drafter, tmp_path / "s", target=facts, dtype=torch.float32)
    record = json.loads(run_in("speculators", "speculators_forward.py", str(tmp_path / "s"), str(zlab)))
    assert record["rows"] == 4 * 5
    assert record["largest"] > 1
    assert record["difference"] < 1e-4


@pytest.mark.parametrize("from_anchor", [True, False])
def test_a_training_step_of_speculators_package_on_dspark_is_ours(tmp_path, from_anchor):
    torch.manual_seed(0)
    target = make_target()
    shape = {"taps": (1, 3, 5), "mask_token_id": 258, "block_size": 6, "sample_from_anchor": from_anchor}
    vocabulary = TargetVocabulary.from_target(target)
    facts = TargetFacts.from_config(target.config.to_dict(), "the tiny target", vocabulary=vocabulary)
    export_speculators(tiny_drafter("dspark", target, **shape), tmp_path / "s", target=facts, dtype=torch.float32)
    record = json.loads(run_in("speculators", "speculators_dspark.py", str(tmp_path / "s")))
    assert (record["missing"], record["unexpected"]) == ([], [])
    assert record["rows"] == 4 * 5
    theirs, ours = record["loss"]
    assert theirs == pytest.approx(ours, rel=1e-5)
    assert record["confidence"] > 0.1
    assert record["gradient"] < 1e-4


@pytest.mark.parametrize("candidates", [5, 270])
def test_speculators_package_gives_our_logits_of_dflash2_and_over_all_candidates_our_training_step(
    tmp_path, candidates
):
    torch.manual_seed(0)
    target = make_target()
    shape = {"taps": (1, 3, 5), "mask_token_id": 258, "block_size": 6, "selector_top_k": candidates}
    vocabulary = TargetVocabulary.from_target(target)
    facts = TargetFacts.from_config(target.config.to_dict(), "the tiny target", vocabulary=vocabulary)
    export_speculators(tiny_drafter("dflash2", target, **shape), tmp_path / "s", target=facts, dtype=torch.float32)
    record = json.loads(run_in("speculators", "speculators_dflash2.py", str(tmp_path / "s")))
    assert (record["missing"], record["unexpected"]) == ([], [])
    assert record["rows"] == 4 * 5
    assert record["largest"] > 1
    assert record["moved"] > 0.1
    assert record["base"] < 1e-4
    assert record["final"] < 1e-4
    theirs, ours = record["loss"]
    if candidates == vocabulary.vocab_size:
        assert theirs == pytest.approx(ours, rel=1e-5)
        assert record["gradient"] < 1e-4
    else:  # their loss is over the candidates, ours over all tokens
        assert theirs < ours - 0.1
