import pytest
import torch

from specauf.metrics import AcceptanceProbability, SupportRatio, TokenAccuracy
from specauf.objectives import AcceptUntilFail, CrossEntropy, Objective, Uniform, block_loss
from tests.objectives.conftest import drafted_logits, random_targets

VOCAB = 11


def output(weighting, every_slot=True, k=0, seed=0):
    targets, _ = random_targets(9, 4, VOCAB, k=k, seed=seed)
    logits = drafted_logits(targets, VOCAB, seed)
    return block_loss(logits, lambda rows: rows, targets, Objective(weighting, CrossEntropy()), every_slot=every_slot)


def test_shares_by_hand():
    out = output(AcceptUntilFail())
    support, valid = out.weights > 0, out.valid
    metrics = [TokenAccuracy("block"), TokenAccuracy("support"), SupportRatio()]
    for metric in metrics:
        metric.update(out)
    expected = [
        out.correct.sum() / valid.sum(),
        (out.correct & support).sum() / support.sum(),
        support.sum() / valid.sum(),
    ]
    assert [m.compute().item() for m in metrics] == pytest.approx([e.item() for e in expected])
    summary = out.summary()
    for name, value in zip(("token_accuracy", "support_accuracy", "support_ratio"), expected, strict=True):
        torch.testing.assert_close(summary[name], value)


def test_uniform_supports_everything():
    metric = SupportRatio()
    metric.update(output(Uniform()))
    assert metric.compute() == 1


def test_full_block_accuracy_refuses_half_seen_blocks():
    with pytest.raises(ValueError, match="every_slot"):
        TokenAccuracy("block").update(output(AcceptUntilFail(), every_slot=False))


def test_alpha_is_the_mean_over_seen_slots():
    out = output(Uniform(), k=3)
    metric = AcceptanceProbability()
    metric.update(out)
    torch.testing.assert_close(metric.compute(), out.alpha[out.seen].mean().float())
    with pytest.raises(ValueError, match="log-probs"):
        metric.update(output(Uniform()))
