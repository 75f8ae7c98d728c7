"""Domino's head, its curriculum, and where a loss that cuts at the first failure cuts each branch."""

import json
from pathlib import Path

import pytest
import torch

from specauf.drafters import DFlashDrafter, DominoDrafter, DominoSpec
from specauf.errors import UserError
from specauf.module import to_head_vocabulary
from specauf.objectives import AcceptUntilFail, CrossEntropy, ExponentialDecay, Objective, SoftTail, Uniform, WarmUp
from specauf.objectives.support import branch_losses, whole_block
from tests.drafters.tiny import BLOCK, five_blocks, tiny_drafter, tiny_target


def blocks():
    return five_blocks("domino")


def test_final_logits_equal_a_slow_reference_written_from_the_paper():
    drafter, vocabulary, batch, d = blocks()
    base, final = drafter.branches(batch, vocabulary)
    logits = final.head(final.rows)
    w = {k: v.double() for k, v in drafter.state_dict().items()}
    ih, hh = w["prefix_gru.weight_ih_l0"].chunk(3), w["prefix_gru.weight_hh_l0"].chunk(3)
    for block, anchor in enumerate([5, 8, 14]):
        s = torch.zeros(12, dtype=torch.float64)
        for k in range(1, BLOCK):
            x = vocabulary.embedding[int(d.tokens[anchor + k - 1])].double()
            reset, update = torch.sigmoid(ih[0] @ x + hh[0] @ s), torch.sigmoid(ih[1] @ x + hh[1] @ s)
            s = (1 - update) * torch.tanh(ih[2] @ x + reset * (hh[2] @ s)) + update * s
            h = base.rows[block, k - 1].double()
            expected = vocabulary.head.double() @ h
            if k > 1:  # the first drafted slot keeps its base logits
                up = w["embed_proj.0.weight"] @ torch.cat([h, s])
                expected = expected + w["embed_proj.2.weight"] @ (up * torch.sigmoid(up))
            torch.testing.assert_close(logits[block, k - 1].double(), expected, atol=1e-5, rtol=1e-5)


def test_the_base_branch_is_dflash_with_the_same_weights():
    drafter, vocabulary, batch, _ = blocks()
    plain = DFlashDrafter(drafter.config)
    assert not plain.load_state_dict(drafter.state_dict(), strict=False).missing_keys
    assert torch.equal(plain.eval()(batch, vocabulary), drafter.branches(batch, vocabulary)[0].rows)


def test_a_fresh_head_corrects_nothing_and_learns_only_the_tokens_it_is_trained_on():
    random, vocabulary, batch, _ = blocks()
    drafter = DominoDrafter(random.config)
    base, final = drafter.branches(batch, vocabulary)
    assert torch.equal(final.head(final.rows), base.head(base.rows))
    some = vocabulary.restrict(torch.arange(0, 61, 2))
    _, final = drafter.branches(batch, some)
    final.head(final.rows).square().sum().backward()
    moved = drafter.embed_proj[2].weight.grad.abs().sum(1) > 0
    assert torch.equal(moved, torch.arange(61) % 2 == 0)


@pytest.mark.parametrize(
    ("start", "ratio", "progress", "share"),
    [(1.0, 1.0, 0.0, 1.0), (1.0, 1.0, 0.25, 0.75), (0.8, 0.5, 0.25, 0.4), (1.0, 0.5, 0.5, 0.0), (1.0, 0.5, 0.9, 0.0)],
)
def test_the_loss_moves_from_the_base_branch_to_the_final_one(start, ratio, progress, share):
    drafter, vocabulary, batch, _ = blocks()
    drafter.base_start, drafter.base_ratio = start, ratio
    base, final = drafter.branches(batch, vocabulary, progress)
    assert (base.name, final.name) == ("base", "final")
    assert base.weight == pytest.approx(share)
    assert final.weight == pytest.approx(1 - share)


@pytest.mark.parametrize("auf_on", ["base", "shared", "own"])
def test_auf_cuts_the_final_branch_where_the_config_says(auf_on):
    drafter, vocabulary, batch, _ = blocks()
    drafter.auf_on = auf_on
    branches = drafter.branches(batch, vocabulary)
    # The random base fails at once: lift the labels' logits in some slots of each branch, so that they fail elsewhere.
    outs = dict(_losses(branches, batch, vocabulary))
    base, final = outs["base"], outs["final"]
    assert base.weights.sum(-1).tolist() == (base.correct.cumprod(-1).sum(-1) + 1).clamp(max=_valid(base)).tolist()
    if auf_on == "base":
        assert torch.equal(final.weights > 0, batch.targets.valid)
    elif auf_on == "shared":
        assert torch.equal(final.weights, base.weights)
        assert torch.equal(final.valid, base.valid)  # what support and accuracy are shares of
        assert "token_accuracy" not in final.summary()
        looked = dict(_losses(branches, batch, vocabulary, every_slot=True))["final"]
        assert torch.equal(looked.seen, base.valid)
        assert looked.summary()["token_accuracy"] < looked.summary()["support_accuracy"]
        for field in ("numerator", "denominator", "weights"):
            assert torch.equal(getattr(looked, field), getattr(final, field))
    else:
        assert (
            final.weights.sum(-1).tolist() == (final.correct.cumprod(-1).sum(-1) + 1).clamp(max=_valid(final)).tolist()
        )
        assert not torch.equal(final.weights, base.weights)


def test_a_tail_that_is_soft_cannot_be_shared():
    drafter, vocabulary, batch, _ = blocks()
    drafter.auf_on = "shared"
    branches = drafter.branches(batch, vocabulary)
    for weighting in (SoftTail(), WarmUp(ExponentialDecay(), SoftTail(), 10)):
        with pytest.raises(UserError, match="auf_on: final counts what base does"):
            list(branch_losses(branches, batch.targets, Objective(weighting, CrossEntropy())))


def _valid(out):
    return out.valid.sum(-1)


def _losses(branches, batch, vocabulary, **settings):
    """AUF on each branch, with heads that are right in slots 1..2 (base) and 1..3 (final) of the odd blocks."""
    from dataclasses import replace

    right = {"base": 2, "final": 3}
    raised = []
    for branch in branches:
        logits = branch.head(branch.rows).detach()
        slot = torch.arange(BLOCK - 1)
        lift = (slot < right[branch.name]) & (torch.arange(len(logits)) % 2 == 1)[:, None]
        wrong = (batch.targets.labels + 1) % vocabulary.vocab_size
        chosen = torch.where(lift, batch.targets.labels, wrong)
        rows = logits.scatter_add(2, chosen[..., None], torch.full_like(chosen[..., None], 50.0, dtype=logits.dtype))
        raised.append(replace(branch, rows=rows, head=torch.nn.Identity()))
    objective = Objective(AcceptUntilFail(), CrossEntropy())
    return [(branch.name, out) for branch, out in branch_losses(raised, batch.targets, objective, **settings)]


def test_taking_the_cut_away_keeps_the_decay_and_the_warm_up():
    def uncut(weighting):
        objective = Objective(weighting, CrossEntropy())
        found = whole_block(objective).weighting
        assert objective.weighting is weighting
        return found

    assert isinstance(uncut(AcceptUntilFail()), Uniform)
    assert isinstance(uncut(SoftTail(3.0)), Uniform)
    decayed = uncut(AcceptUntilFail(decay_gamma=4.0))
    assert isinstance(decayed, ExponentialDecay)
    assert decayed.gamma == 4.0
    warm = uncut(WarmUp(ExponentialDecay(7.0), AcceptUntilFail(), 10, "cosine"))
    assert isinstance(warm, WarmUp)
    assert isinstance(warm.after, Uniform)
    assert (warm.warmup_steps, warm.schedule) == (10, "cosine")
    kept = ExponentialDecay(7.0)
    assert uncut(kept) is kept


@pytest.mark.parametrize("kept", [61, 20])
def test_gradients_of_the_head_reach_the_recurrent_state_and_the_backbone(kept):
    drafter, vocabulary, batch, _ = blocks()
    drafter.train()
    if kept < 61:
        vocabulary = vocabulary.restrict(torch.arange(kept))
        batch = batch.with_targets(to_head_vocabulary(batch.targets, vocabulary))
        assert batch.targets.valid.any(-1).sum() > 1
    branches = drafter.branches(batch, vocabulary, 0.5)
    # Nothing the size of the vocabulary is gathered for a head that is not.
    assert [len(tensor) for tensor in branches[1].head.trained()] == [drafter.config.emb_dim, kept]
    objective = Objective(Uniform(), CrossEntropy())
    sum(
        (b.weight * o.numerator for b, o in branch_losses(branches, batch.targets, objective)), torch.zeros(())
    ).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in drafter.parameters())
    # The same through dense logits.
    found = {n: p.grad.clone() for n, p in drafter.named_parameters()}
    drafter.zero_grad()
    total = torch.zeros(())
    for branch in drafter.branches(batch, vocabulary, 0.5):
        total = total + branch.weight * objective.loss(branch.head(branch.rows), batch.targets).numerator
    total.backward()
    for name, parameter in drafter.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-4, rtol=1e-4)


def test_saved_and_read_back_and_not_mistaken_for_dflash(tmp_path: Path):
    drafter, vocabulary, batch, _ = blocks()
    drafter.save_pretrained(tmp_path)
    again = DominoDrafter.from_pretrained(tmp_path)
    assert again.config == drafter.config
    rows = [d.branches(batch, vocabulary)[1] for d in (drafter, again)]
    assert torch.equal(rows[0].head(rows[0].rows), rows[1].head(rows[1].rows))
    with pytest.raises(UserError, match=r"config.json is that of a domino drafter, dflash expected"):
        DFlashDrafter.from_pretrained(tmp_path)
    file = tmp_path / "config.json"
    raw = json.loads(file.read_text())
    raw["dflash_config"]["shift_label"] = True
    file.write_text(json.dumps(raw))
    with pytest.raises(UserError, match="shift_label: True"):
        DominoDrafter.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_start": 1.5}, "base_start: 1.5 found, 0..1 expected"),
        ({"base_ratio": 0.0}, "base_ratio: 0.0 found"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        DominoSpec(**settings)


@pytest.mark.parametrize("changes", [{"emb_dim": 0}, {"gru_hidden_dim": 0}, {"pure_draft_prefix_len": BLOCK - 1}])
def test_shapes_without_a_head_are_refused(changes):
    with pytest.raises(UserError, match=next(iter(changes))):
        tiny_drafter("domino", tiny_target(), **changes)
