"""The audit's figures by hand, and against independent ways to get the same numbers."""

import json

import numpy as np
import pytest
import torch

from specauf.cache import open_cache
from specauf.cli import main
from specauf.decoding import replay
from specauf.drafters import DSparkConfig, DSparkDrafter, TargetVocabulary
from specauf.evaluation import audit_blocks
from specauf.evaluation.audit import block_ends, by_kind, by_slot, calibration, support, token_kind
from specauf.evaluation.audit_blocks import Blocks, observe, observe_documents, visited
from specauf.evaluation.settings import Setting
from specauf.evaluation.summary import tau_pooled
from tests.builder.conftest import make_target
from tests.drafters.tiny import tiny_dflash
from tests.evaluation.conftest import made_record, tiny_drafter


def blocks(right: list[str]) -> Blocks:
    """Blocks from patterns: 1 right, 0 wrong, - behind the answer's end. Every loss is 2 nats, every label 7."""
    marks = np.array([list(row) for row in right])
    valid, correct = torch.from_numpy(marks != "-"), torch.from_numpy(marks == "1")
    labels = torch.full(valid.shape, 7)
    half, two = torch.full(valid.shape, 0.5), torch.full(valid.shape, 2.0)
    return Blocks(labels, valid, torch.where(correct, 7, 8), half, two, half * torch.nan)


def test_support_by_hand():
    found = support(blocks(["0111", "1101", "11--"]), gamma=1.0)
    assert found["support_ratio"] == pytest.approx((1 + 3 + 2) / 10)
    assert found["uniform"]["wasted_weight"] == pytest.approx(4 / 10)
    w = np.exp(-np.arange(4.0))
    whole = 2 * w.sum() + w[:2].sum()
    assert found["decay"]["wasted_weight"] == pytest.approx((w[1:].sum() + w[3]) / whole)
    assert found["decay"]["wasted_loss"] == pytest.approx(found["decay"]["wasted_weight"])
    assert found["auf"]["wasted_weight"] == 0
    assert found["auf"]["weight_by_slot"] == pytest.approx([3 / 6, 2 / 6, 1 / 6, 0])


def test_slots_by_hand():
    found = by_slot(blocks(["0111", "1101", "11--"]))
    assert found["survival"] == pytest.approx([2 / 3, 2 / 3, 0, 0])
    assert found["conditional"] == [pytest.approx(2 / 3), 1.0, 0.0, None]
    assert found["accuracy"] == pytest.approx([2 / 3, 1, 1 / 2, 1])


def test_calibration_by_hand():
    confidence = torch.tensor([0.05, 0.95, 0.95, 0.95, 1.0])
    correct = torch.tensor([False, True, True, False, True])
    found = calibration(confidence, correct)
    assert [b["slots"] for b in found["bins"]] == [1, 4]
    assert found["ece"] == pytest.approx(1 / 5 * 0.05 + 4 / 5 * abs(3 / 4 - 0.9625))
    assert found["brier"] == pytest.approx((3 * 0.05**2 + 0.95**2) / 5)
    assert calibration(torch.full((8,), 0.5), torch.arange(8) % 2 == 0)["ece"] == 0


def test_kinds_and_ends_count_the_slots_decoding_reaches():
    found = blocks(["0111", "1101", "11--"])
    assert by_kind(found, lambda token: f"kind {token}") == {
        "kind 7": {"reached": 6, "acceptance": pytest.approx(4 / 6), "share_of_ends": 1.0}
    }
    [end] = block_ends(found, str)
    assert (end["token"], end["ends"], end["drafted_instead"]) == (7, 2, "8")
    assert end["acceptance"] == pytest.approx(4 / 6)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("\n  ", "newline"),
        ("  ", "space"),
        ("12", "number"),
        (" def", "word start"),
        ("_name", "word piece"),
        ("):", "punctuation"),
        ("", "space"),
    ],
)
def test_token_kinds(text: str, kind: str):
    assert token_kind(text) == kind


@pytest.fixture(scope="module")
def opened(tiny_cache):
    return open_cache(str(tiny_cache))


@pytest.fixture(scope="module")
def fitted(opened):
    """A drafter that accepts some cached tokens: trained a little on the held-out documents themselves."""
    torch.manual_seed(0)
    target = make_target()
    drafter = tiny_dflash(target, taps=(1, 2, 3, 4, 5), mask_token_id=258).train()
    vocabulary = TargetVocabulary.from_cache(opened)
    from specauf.data.blocks import make_block_batch

    documents = list(opened.documents(split="held_out"))
    batch = make_block_batch(documents, block_size=6, anchors_per_document=50, seed=0, epoch=0)
    optimizer = torch.optim.Adam(drafter.parameters(), 5e-3)
    for _ in range(25):
        logits = vocabulary.logits(drafter(batch, vocabulary))[batch.targets.valid]
        torch.nn.functional.cross_entropy(logits, batch.targets.labels[batch.targets.valid]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return drafter.eval()


def test_the_decoding_view_is_replay(opened, fitted, monkeypatch):
    vocabulary, documents = TargetVocabulary.from_cache(opened), list(opened.documents(split="held_out"))
    shared = []
    monkeypatch.setattr(audit_blocks, "replay", lambda d, v, group: shared.append(len(group)) or replay(d, v, group))
    observed = observe_documents(fitted, vocabulary, documents, 4, 0)
    assert shared == [len(documents)], "documents share their passes"
    cycles = replay(fitted, vocabulary, documents)
    assert observed.accepted == [c.accepted.tolist() for c in cycles]
    assert observed.decoding.accepted.tolist() == [a for c in cycles for a in c.accepted.tolist()]
    assert 0 < observed.decoding.accepted.double().mean() < 5
    # What is skipped behind the first wrong draft changes nothing that decoding sees.
    for document, found in zip(documents, cycles, strict=True):
        anchors = visited(document, found)
        whole, short = (observe(fitted, vocabulary, document, anchors, every_slot=e) for e in (True, False))
        assert torch.equal(whole.reached, short.reached)
        torch.testing.assert_close(whole.confidence[whole.reached], short.confidence[whole.reached])
        assert (short.drafted[~short.reached] == -1).all()


def test_losses_are_those_of_training(opened, fitted):
    """The same blocks through the training path."""
    from specauf.data.blocks import make_block_batch

    vocabulary, document = TargetVocabulary.from_cache(opened), next(iter(opened.documents(split="held_out")))
    batch = make_block_batch([document], block_size=6, anchors_per_document=3, seed=5, epoch=0)
    logits = vocabulary.logits(fitted(batch, vocabulary))
    found = observe(fitted, vocabulary, document, batch.anchors.numpy())
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.labels.flatten(), reduction="none")
    torch.testing.assert_close(found.loss[found.valid], expected.view(found.valid.shape)[found.valid])
    assert torch.equal(found.drafted[found.valid], logits.argmax(-1)[found.valid])


def test_the_command_writes_both_pages_and_no_target_is_loaded(tiny_cache, fitted, tmp_path, monkeypatch, capsys):
    import transformers

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", None)
    fitted.save_pretrained(tmp_path / "drafter")
    real = made_record(Setting(9, 1.0, block_size=3), Setting(9, block_size=3))
    real["parts"][1]["runs"]["mine"] |= {"tau_pooled": 1.25, "tau_pooled_95": [1.1, 1.4]}
    (tmp_path / "evaluation.json").write_text(json.dumps(real))
    words = ["audit", str(tiny_cache), str(tmp_path / "drafter"), f"--out={tmp_path}", f"--evaluation={tmp_path}"]
    assert main(words) == 0
    record, page = json.loads((tmp_path / "audit.json").read_text()), (tmp_path / "audit.md").read_text()
    assert record["tau"]["answers_are_greedy"] is True
    assert record["tau"]["evaluated"] == 1.25
    opened = open_cache(str(tiny_cache))
    documents = list(opened.documents(split="held_out"))
    cycles = replay(fitted, TargetVocabulary.from_cache(opened), documents, block_size=3)
    shorter = tau_pooled([c.accepted.tolist() for c in cycles])
    assert record["tau"]["replay_as_evaluated"] == shorter
    assert shorter < record["tau"]["replay"]
    assert f"in blocks of 3: 1.250 (1.100 to 1.400), {1.25 / shorter - 1:+.1%} against replay in such blocks" in page
    assert f"{record['tau']['replay']:.3f}" in page
    assert f"{record['support']['uniform']['wasted_weight']:.1%}" in page
    assert record["documents"] == 6
    assert page in capsys.readouterr().out


def test_an_evaluation_without_greedy_decoding_is_refused(tiny_cache, fitted, tmp_path, capsys):
    fitted.save_pretrained(tmp_path / "drafter")
    (tmp_path / "evaluation.json").write_text(json.dumps(made_record(Setting(9, temperature=1.0))))
    words = ["audit", str(tiny_cache), str(tmp_path / "drafter"), f"--evaluation={tmp_path}"]
    assert main(words) == 2
    assert "has no greedy decoding: run specauf evaluate with --temperatures=[0]" in capsys.readouterr().err


def test_an_untrained_drafter_wastes_nearly_everything(tiny_cache, tmp_path):
    torch.manual_seed(0)
    tiny_drafter(make_target()).save_pretrained(tmp_path / "drafter")
    assert main(["audit", str(tiny_cache), str(tmp_path / "drafter"), f"--json={tmp_path}/a.json"]) == 0
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["support"]["uniform"]["wasted_weight"] > 0.6
    assert record["calibration"]["stated"] is None


def test_a_confidence_head_is_compared_with_what_decoding_accepts(opened, tiny_cache, tmp_path):
    torch.manual_seed(0)
    shape = {"num_hidden_layers": 1, "block_size": 6, "taps": (1, 2, 3, 4, 5), "mask_token_id": 258, "markov_rank": 4}
    drafter = DSparkDrafter(DSparkConfig.from_target(make_target().config.to_dict(), **shape)).eval()
    torch.nn.init.normal_(drafter.confidence_head.proj.weight)
    drafter.save_pretrained(tmp_path / "drafter")
    assert main(["audit", str(tiny_cache), str(tmp_path / "drafter"), f"--out={tmp_path}"]) == 0
    found = json.loads((tmp_path / "audit.json").read_text())["calibration"]["stated"]
    documents = list(opened.documents(split="held_out"))
    seen = observe_documents(drafter, TargetVocabulary.from_cache(opened), documents, 4, 0).decoding
    assert not seen.stated[seen.reached].isnan().any()
    assert found == calibration(seen.stated[seen.reached], seen.correct[seen.reached])
    assert len(found["bins"]) > 1
    page = (tmp_path / "audit.md").read_text()
    assert f"confidence head\n\nExpected calibration error {found['ece']:.3f} over the slots" in page
    assert f"Brier score {found['brier']:.3f}; of its probabilities" in page
