"""DFlash 2: its convolutions and its choice among candidates against slow references, and where AUF cuts its losses."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specauf.decoding.rules import GreedyDraft, Rejection
from specauf.drafters import DFlash2Drafter, DFlash2Spec, DFlashDrafter
from specauf.drafters.convolution import convolve
from specauf.errors import UserError
from specauf.module import to_head_vocabulary
from specauf.objectives import AcceptUntilFail, CrossEntropy, Objective, Uniform
from specauf.objectives.support import branch_losses
from tests.drafters.tiny import BLOCK, VOCAB, five_blocks, tiny_drafter, tiny_target

TOP = 5


def blocks():
    return five_blocks("dflash2")


@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 3), st.sampled_from([1, 2, 4]))
def test_a_convolution_is_a_sum_over_the_slots_before(taps, slots, groups, size):
    torch.manual_seed(taps * 100 + slots)
    hidden = groups * size
    x = torch.randn(2, slots, hidden, dtype=torch.float64, requires_grad=True)
    dynamic = torch.randn(2, slots, taps, groups, dtype=torch.float64, requires_grad=True)
    base = torch.randn(taps, hidden, dtype=torch.float64, requires_grad=True)
    expected = torch.zeros(2, slots, hidden, dtype=torch.float64)
    for b in range(2):
        for t in range(slots):
            for c in range(hidden):
                for j in range(min(taps, t + 1)):
                    weight = base[j, c] + dynamic[b, t, j, c // size]
                    expected[b, t, c] = expected[b, t, c] + weight * x[b, t - j, c]
    found = convolve(x, dynamic, base)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(found)
    of_found = torch.autograd.grad((found * weights).sum(), [x, dynamic, base])
    torch.testing.assert_close(of_found, torch.autograd.grad((expected * weights).sum(), [x, dynamic, base]))


def test_a_fresh_drafter_is_dflash_with_the_same_seed():
    random, vocabulary, batch, _ = blocks()
    torch.manual_seed(3)
    fresh = DFlash2Drafter(random.config)
    torch.manual_seed(3)
    plain = DFlashDrafter(random.config)
    for name, value in plain.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value)
    base, final = fresh.branches(batch, vocabulary)
    torch.testing.assert_close(base.rows, plain(batch, vocabulary))
    assert torch.equal(final.head(final.rows), base.head(base.rows))
    for std, name in ((0.02, "predecessor_codebook"), (0.02, "hidden_projection.weight"), (0.0, "successor_codebook")):
        weight = fresh.candidate_selector.state_dict()[name]
        assert weight.std().item() == pytest.approx(std, rel=0.2)


def test_every_convolution_and_the_selector_change_what_is_drafted():
    drafter, vocabulary, batch, _ = blocks()
    before = drafter.branches(batch, vocabulary)[1]
    logits = before.head(before.rows)
    weights = drafter.state_dict()
    for name in weights:
        if "conv" in name or "selector" in name:
            drafter.load_state_dict(weights | {name: torch.zeros_like(weights[name])})
            after = drafter.branches(batch, vocabulary)[1]
            assert not torch.allclose(after.head(after.rows), logits, atol=1e-3), name


def reference(drafter, vocabulary, hidden, before):
    """Final logits of one slot, and its candidates, by the formula."""
    w = {k: v.double() for k, v in drafter.candidate_selector.state_dict().items()}
    base = vocabulary.head.double() @ hidden.double()
    best = sorted(range(len(base)), key=lambda v: -base[v].item())[:TOP]
    turned = w["hidden_projection.weight"] @ hidden.double()
    final = base.clone()
    for v in best:
        for r, weight in enumerate(turned):
            final[v] += w["predecessor_codebook"][before, r] * weight * w["successor_codebook"][v, r]
    return final, best


def test_final_logits_equal_a_slow_reference():
    drafter, vocabulary, batch, d = blocks()
    base, final = drafter.branches(batch, vocabulary)
    logits = final.head(final.rows)
    for block, anchor in enumerate([5, 8, 14]):
        for slot in range(BLOCK - 1):
            expected, _ = reference(drafter, vocabulary, base.rows[block, slot], int(d.tokens[anchor + slot]))
            torch.testing.assert_close(logits[block, slot].double(), expected, atol=1e-5, rtol=1e-5)


def test_tokens_are_the_best_candidates_behind_those_drafted_before():
    drafter, vocabulary, batch, _ = blocks()
    drafter.candidate_selector.successor_codebook.data *= 20
    base = drafter.branches(batch, vocabulary)[0]
    anchors = batch.tokens[batch.anchors]
    found = drafter.propose(base.rows, anchors, vocabulary, lambda logits: (logits.argmax(-1), None)).tokens
    changed = 0
    for block, anchor in enumerate(anchors.tolist()):
        before = anchor
        for slot in range(BLOCK - 1):
            final, best = reference(drafter, vocabulary, base.rows[block, slot], before)
            before = max(best, key=lambda v: final[v].item())
            assert found[block, slot] == before
            changed += before != best[0]
    assert 3 < changed < 22, "the selector always or never chooses another"


def test_replay_and_audit_see_the_trained_logits_and_draft_candidates():
    drafter, vocabulary, batch, d = blocks()
    drafter.candidate_selector.successor_codebook.data *= 50
    drafter.candidate_selector.top_k = 2
    _, final = drafter.branches(batch, vocabulary)
    trained = final.head(final.rows)
    hidden = final.rows[..., : drafter.config.hidden_size]
    best = vocabulary.logits(hidden).topk(2).indices
    alive, outside = torch.arange(len(trained)), 0
    labels = torch.stack([torch.from_numpy(d.tokens[a + 1 : a + BLOCK]) for a in (5, 8, 14, 20)])
    for slot in range(BLOCK - 1):
        given = (hidden[:4], slot, alive[:4], batch.tokens[batch.anchors[:4]], labels, vocabulary)
        logits, column = drafter.slot_draft(*given)
        torch.testing.assert_close(logits, trained[:4, slot])
        scores = logits.gather(-1, best[:4, slot])
        assert torch.equal(column, best[alive[:4], slot, scores.argmax(-1)])
        outside += int((logits.argmax(-1) != column).sum())
    assert outside, "no token but a candidate was ever the most probable"


@pytest.mark.parametrize("rule", [Rejection, GreedyDraft])
def test_sampled_tokens_are_candidates_and_their_probabilities_sum_to_one(rule):
    drafter, vocabulary, batch, _ = blocks()
    base = drafter.branches(batch, vocabulary)[0]
    chosen = rule(0.7, None, 0.95, torch.Generator().manual_seed(0))
    proposal = drafter.propose(base.rows, batch.tokens[batch.anchors], vocabulary, chosen.choose)
    best = vocabulary.logits(base.rows).topk(TOP).indices
    assert bool((best == proposal.tokens[..., None]).any(-1).all())
    if proposal.probs is None:
        return
    torch.testing.assert_close(proposal.probs.sum(-1), torch.ones(proposal.tokens.shape))
    assert proposal.probs.gather(-1, best).sum(-1).min().item() == pytest.approx(1.0)
    assert proposal.probs.gather(-1, proposal.tokens[..., None]).min() > 0


@pytest.mark.parametrize("auf_on", ["final", "base", "own"])
def test_auf_cuts_both_losses_where_the_config_says(auf_on):
    drafter, vocabulary, batch, _ = blocks()
    drafter.auf_on = auf_on
    raised = []
    # The odd blocks' base is right in slots 1..2, what is drafted in slots 1..3.
    for branch, right in zip(drafter.branches(batch, vocabulary), (2, 3), strict=True):
        logits = torch.zeros(*branch.rows.shape[:2], VOCAB)
        lift = (torch.arange(BLOCK - 1) < right) & (torch.arange(len(logits)) % 2 == 1)[:, None]
        chosen = torch.where(lift, batch.targets.labels, (batch.targets.labels + 1) % VOCAB)
        logits.scatter_(2, chosen[..., None], 50.0)
        raised.append(replace(branch, rows=logits, head=torch.nn.Identity()))
    objective = Objective(AcceptUntilFail(), CrossEntropy())
    outs = {branch.name: out for branch, out in branch_losses(raised, batch.targets, objective)}
    slots = {name: [int(n) for n in (out.weights > 0).sum(-1)] for name, out in outs.items()}
    valid = batch.targets.valid.sum(-1).tolist()
    until = {right: [min(right + 1 if b % 2 else 1, n) for b, n in enumerate(valid)] for right in (2, 3)}
    assert slots["final"] == (valid if auf_on == "base" else until[3])
    assert slots["base"] == (until[3] if auf_on == "final" else until[2])


@pytest.mark.parametrize("kept", [VOCAB, 20])
@pytest.mark.parametrize("weighting", [Uniform(), AcceptUntilFail()])
def test_gradients_of_both_losses_equal_those_through_dense_logits(kept, weighting):
    drafter, vocabulary, batch, _ = blocks()
    drafter.double().train()
    vocabulary.double()
    batch = replace(batch, features=batch.features.double())
    if kept < VOCAB:
        vocabulary = vocabulary.restrict(torch.arange(kept))
        batch = batch.with_targets(to_head_vocabulary(batch.targets, vocabulary))
        assert batch.targets.valid.any(-1).sum() > 1
    objective = Objective(weighting, CrossEntropy())
    drafter.auf_on = "own"
    outs = branch_losses(drafter.branches(batch, vocabulary), batch.targets, objective)
    sum((b.weight * o.numerator for b, o in outs), torch.zeros(())).backward()
    found = {n: p.grad.clone() for n, p in drafter.named_parameters()}
    assert all(gradient.abs().sum() > 0 for gradient in found.values())
    drafter.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for branch in drafter.branches(batch, vocabulary):
        total = total + branch.weight * objective.loss(branch.head(branch.rows), batch.targets).numerator
    total.backward()
    for name, parameter in drafter.named_parameters():
        gradient = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
        torch.testing.assert_close(found[name], gradient, atol=1e-10, rtol=1e-8)


def test_saved_and_read_back_and_not_mistaken_for_dflash(tmp_path: Path):
    drafter, vocabulary, batch, _ = blocks()
    drafter.save_pretrained(tmp_path)
    again = DFlash2Drafter.from_pretrained(tmp_path)
    assert again.config == drafter.config
    one, two = (d.branches(batch, vocabulary)[1] for d in (drafter, again))
    assert torch.equal(one.head(one.rows), two.head(two.rows))
    with pytest.raises(UserError, match=r"config.json is that of a dflash2 drafter, dflash expected"):
        DFlashDrafter.from_pretrained(tmp_path)
    file = tmp_path / "config.json"
    raw = json.loads(file.read_text())
    for value, said in ((None, "missing"), ("16", "'16', no whole number,")):
        raw["dflash_config"]["selector_top_k"] = value
        file.write_text(json.dumps(raw))
        with pytest.raises(UserError, match=f"dflash_config.selector_top_k: {said} in .* no DFlash 2 drafter"):
            DFlash2Drafter.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conv_group_size": 5}, "conv_group_size: 5 does not divide hidden_size 32"),
        ({"conv_kernel_size": 7}, "conv_kernel_size: 7 found, 1 to 6 expected"),
        ({"selector_top_k": 0}, "selector_top_k: 0 found, 1 to 61 expected"),
        ({"selector_rank": 0}, "selector_rank: 0 found, at least 1 expected"),
    ],
)
def test_shapes_without_meaning_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        tiny_drafter("dflash2", tiny_target(), **changes)


@pytest.mark.parametrize("inner", [True, False])
def test_a_drafter_that_scales_its_logits_is_refused(inner: bool, tmp_path: Path):
    blocks()[0].save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    place = raw["dflash_config"] if inner else raw
    for factor in (1.0, 0.5):
        place["output_multiplier"] = factor
        (tmp_path / "config.json").write_text(json.dumps(raw))
        if factor == 1.0:
            DFlash2Drafter.from_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"output_multiplier: 0.5 in the drafter's config.json, 1 expected"):
        DFlash2Drafter.from_pretrained(tmp_path)


def test_a_negative_weight_of_the_base_loss_is_refused():
    with pytest.raises(UserError, match=r"base_weight: -1.0 found, a finite number from 0 expected"):
        DFlash2Spec(base_weight=-1.0)


def test_a_block_may_be_shorter_than_the_kernel():
    x, dynamic, base = torch.randn(1, 2, 4), torch.randn(1, 2, 4, 2), torch.randn(4, 4)
    longer = convolve(torch.cat([x, torch.randn(1, 3, 4)], 1), torch.cat([dynamic, torch.randn(1, 3, 4, 2)], 1), base)
    assert torch.equal(convolve(x, dynamic, base), longer[:, :2])
