"""DSpark: the biases of its Markov head and its confidence against slow references, and what they are trained with."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from specauf.data.batch import BlockTargets
from specauf.drafters import DFlashDrafter, DSparkDrafter, DSparkSpec
from specauf.drafters.attention import BlockLayout, SdpaAttend
from specauf.drafters.blocks import rotation
from specauf.errors import UserError
from specauf.module import to_head_vocabulary
from specauf.objectives import AcceptUntilFail, CrossEntropy, ExponentialDecay, ForwardKL, Objective
from specauf.objectives.support import branch_losses
from tests.drafters.tiny import BLOCK, MASK, VOCAB, five_blocks, tiny_drafter, tiny_target

KINDS = ("vanilla", "gated", "rnn")
SLOTS = BLOCK - 1


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def reference(drafter, vocabulary, hidden, tokens):
    """Final logits and confidences of a block's slots, number by number, from [slots, hidden] and the tokens before."""
    w = {name: value.double().tolist() for name, value in drafter.markov_head.state_dict().items()}
    c = {name: value.double().tolist() for name, value in drafter.confidence_head.state_dict().items()}
    rank, kind = drafter.config.markov_rank, drafter.config.markov_head_type
    state, logits, sure = [0.0] * rank, [], []

    def affine(name, inputs):
        rows = zip(w[f"{name}.weight"], w[f"{name}.bias"], strict=True)
        return [sum(a * b for a, b in zip(row, inputs, strict=True)) + bias for row, bias in rows]

    for h, token in zip(hidden.double().tolist(), tokens, strict=True):
        e = w["markov_w1.weight"][token]
        u = e
        if kind == "gated":
            u = [sigmoid(g) * x for g, x in zip(affine("gate_proj", h + e), e, strict=True)]
        if kind == "rnn":
            out = affine("joint_proj", state + e + h)
            keep, candidate = [sigmoid(x) for x in out[:rank]], [math.tanh(x) for x in out[rank : 2 * rank]]
            u = [math.tanh(x) for x in out[2 * rank :]]
            state = [k * s + (1 - k) * x for k, s, x in zip(keep, state, candidate, strict=True)]
        base = (vocabulary.head.double() @ torch.tensor(h, dtype=torch.float64)).tolist()
        bias = [sum(a * b for a, b in zip(row, u, strict=True)) for row in w["markov_w2.weight"]]
        logits.append([x + y for x, y in zip(base, bias, strict=True)])
        read = zip(c["proj.weight"][0], h + e, strict=True)
        sure.append(sigmoid(sum(a * b for a, b in read) + c["proj.bias"][0]))
    return torch.tensor(logits, dtype=torch.float64), torch.tensor(sure, dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_final_logits_and_confidence_equal_a_slow_reference(kind):
    drafter, vocabulary, batch, d = five_blocks("dspark", markov_head_type=kind)
    (branch,) = drafter.branches(batch, vocabulary)
    logits, hidden = branch.head(branch.rows), drafter(batch, vocabulary)
    for block, anchor in enumerate([5, 8, 14, 20]):
        expected, sure = reference(drafter, vocabulary, hidden[block], d.tokens[anchor : anchor + SLOTS])
        torch.testing.assert_close(logits[block].double(), expected, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(branch.confidence.logits[block].double().sigmoid(), sure, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_the_best_behind_those_drafted_before(kind):
    drafter, vocabulary, batch, _ = five_blocks("dspark", markov_head_type=kind)
    drafter.markov_head.markov_w2.weight.data *= 20
    hidden, anchors = drafter(batch, vocabulary), batch.tokens[batch.anchors]
    found = drafter.propose(hidden, anchors, vocabulary, lambda logits: (logits.argmax(-1), None)).tokens
    changed = 0
    for block, anchor in enumerate(anchors.tolist()):
        tokens = [anchor]
        for slot in range(SLOTS):
            logits, _ = reference(drafter, vocabulary, hidden[block, : slot + 1], tokens)
            tokens.append(int(logits[-1].argmax()))
            changed += tokens[-1] != int(vocabulary.logits(hidden[block, slot]).argmax())
        assert found[block].tolist() == tokens[1:]
    assert changed > 3, "the head never changes a token"


@pytest.mark.parametrize("kind", KINDS)
def test_replay_and_audit_see_the_trained_logits(kind):
    drafter, vocabulary, batch, d = five_blocks("dspark", markov_head_type=kind)
    (branch,) = drafter.branches(batch, vocabulary)
    trained, hidden = branch.head(branch.rows), drafter(batch, vocabulary)
    labels = torch.stack([torch.from_numpy(d.tokens[a + 1 : a + BLOCK]) for a in (5, 8, 14, 20)])
    for slot in range(SLOTS):
        alive = torch.arange(4)[slot % 2 :]
        given = (hidden[:4], slot, alive, batch.tokens[batch.anchors[:4]], labels, vocabulary)
        logits, column = drafter.slot_draft(*given)
        torch.testing.assert_close(logits, trained[alive, slot])
        assert torch.equal(column, logits.argmax(-1))
        stated = drafter.slot_confidence(*given[:-1])
        torch.testing.assert_close(stated, branch.confidence.logits[alive, slot].sigmoid())


@pytest.mark.parametrize("slots", [SLOTS, 2, 1])
def test_from_the_anchor_every_row_predicts_the_token_behind_it(slots):
    drafter, vocabulary, batch, _ = five_blocks("dspark")
    context = drafter.encode(batch, vocabulary)
    attend = SdpaAttend(BlockLayout(torch.zeros(5, dtype=torch.int64), batch.anchors))
    tokens = batch.tokens[batch.anchors]
    found = drafter.block_rows(tokens, batch.anchors, context, attend, vocabulary, slots + 1)
    x = vocabulary.embed(torch.cat([tokens[:, None], torch.full((5, slots - 1), MASK)], 1))
    by = rotation(batch.anchors[:, None] + torch.arange(slots), 8, 10000.0, torch.float32)
    for layer, key_value in zip(drafter.layers, context, strict=True):
        x = layer(x, by, key_value, attend)
    torch.testing.assert_close(found, drafter.norm(x))
    assert found.shape == (5, slots, 32)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_drafter_is_dflash_with_the_same_seed(kind):
    random, vocabulary, batch, _ = five_blocks("dspark of own slots", markov_head_type=kind)
    torch.manual_seed(3)
    fresh = DSparkDrafter(random.config)
    torch.manual_seed(3)
    plain = DFlashDrafter(random.config)
    for name, value in plain.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value)
    (branch,) = fresh.branches(batch, vocabulary)
    assert torch.equal(branch.head(branch.rows), vocabulary.logits(plain(batch, vocabulary)))
    for name, value in fresh.state_dict().items():
        if "markov" in name or "confidence" in name:
            expected = 0.0 if name.endswith("bias") or "w2" in name else 0.02
            assert value.std(correction=0).item() == pytest.approx(expected, rel=0.25), name


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_of_the_heads_changes_what_is_said(kind):
    drafter, vocabulary, batch, _ = five_blocks("dspark", markov_head_type=kind)

    def said():
        (branch,) = drafter.branches(batch, vocabulary)
        return torch.cat([branch.head(branch.rows), branch.confidence.logits[..., None]], -1)

    before, weights = said(), drafter.state_dict()
    names = [name for name in weights if "markov" in name or "confidence" in name]
    assert len(names) == {"vanilla": 4, "gated": 6, "rnn": 6}[kind]
    for name in names:
        drafter.load_state_dict(weights | {name: torch.zeros_like(weights[name])})
        assert not torch.allclose(said(), before, atol=1e-3), name


def with_teacher(targets: BlockTargets, k: int = 5) -> BlockTargets:
    """The targets with the target's k most probable tokens, which are random, and what they hold together."""
    shape = (*targets.labels.shape, k)
    generator = torch.Generator().manual_seed(1)
    ids = torch.rand(*targets.labels.shape, VOCAB, generator=generator).topk(k).indices
    held = torch.rand(shape, generator=generator).double().sort(descending=True).values
    held = 0.9 * held / held.sum(-1, keepdim=True)
    return BlockTargets(targets.labels, targets.valid, ids, held.log(), held.sum(-1))


OBJECTIVES = {
    "auf": Objective(AcceptUntilFail(), CrossEntropy()),
    "decay": Objective(ExponentialDecay(4.0), CrossEntropy()),
    "decay, per block": Objective(ExponentialDecay(4.0), CrossEntropy(), reduction="block"),
    "auf, distilled": Objective(AcceptUntilFail(), ForwardKL()),
}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kept", [VOCAB, 20])
def test_value_and_gradients_equal_a_slow_reference(kept, kind, name):
    drafter, vocabulary, batch, _ = five_blocks("dspark", markov_head_type=kind)
    drafter.double().train()
    vocabulary.double()
    drafter.confidence_weight = 0.7
    batch = replace(batch, features=batch.features.double())
    objective = OBJECTIVES[name]
    if objective.needs_teacher:
        batch = batch.with_targets(with_teacher(batch.targets))
    if kept < VOCAB:
        vocabulary = vocabulary.restrict(torch.arange(kept))
        batch = batch.with_targets(to_head_vocabulary(batch.targets, vocabulary))
        assert batch.targets.valid.any(-1).sum() > 1
    ((_, out),) = branch_losses(drafter.branches(batch, vocabulary), batch.targets, objective)
    out.numerator.backward()
    found = {n: p.grad.clone() for n, p in drafter.named_parameters()}
    assert all(gradient.abs().sum() > 0 for gradient in found.values())
    drafter.zero_grad()

    (branch,) = drafter.branches(batch, vocabulary)
    dense = objective.loss(branch.head(branch.rows), batch.targets)
    confidence = branch.confidence.logits.sigmoid()
    total = dense.numerator
    for b, row in enumerate(dense.weights):
        share = 1.0 if objective.reduction == "token" or not row.sum() else 1 / row.sum()
        for k, weight in enumerate(row):
            came = dense.alpha[b, k] if objective.needs_teacher else dense.correct[b, k].double()
            said = confidence[b, k]
            total = total - 0.7 * share * weight * (came * said.log() + (1 - came) * (1 - said).log())
    torch.testing.assert_close(out.numerator.detach(), total.detach())
    total.backward()
    for parameter_name, parameter in drafter.named_parameters():
        torch.testing.assert_close(found[parameter_name], parameter.grad, atol=1e-10, rtol=1e-8)


def test_under_auf_the_confidence_learns_only_of_slots_that_were_reached():
    drafter, vocabulary, batch, _ = five_blocks("dspark")
    (branch,) = drafter.branches(batch, vocabulary)
    logits = branch.confidence.logits.detach().requires_grad_()
    branch = replace(branch, rows=branch.rows.detach(), confidence=replace(branch.confidence, logits=logits))
    ((_, out),) = branch_losses([branch], batch.targets, OBJECTIVES["auf"])
    out.numerator.backward()
    assert torch.equal(logits.grad != 0, out.weights > 0)
    expected = (logits.detach().sigmoid() - out.correct.double())[out.weights > 0]
    torch.testing.assert_close(logits.grad[out.weights > 0], expected.float())
    mean = float(out.summary()["confidence_error"])
    assert mean == pytest.approx(float(expected.abs().mean()), rel=1e-5)


def test_without_a_confidence_head_the_tokens_are_trained_all_the_same():
    drafter, vocabulary, batch, _ = five_blocks("dspark", enable_confidence_head=False)
    (branch,) = drafter.branches(batch, vocabulary)
    assert branch.confidence is None
    assert drafter.slot_confidence(branch.rows, 0, torch.arange(2), batch.tokens[:5], batch.targets.labels) is None
    assert not [name for name in drafter.state_dict() if "confidence" in name]
    ((_, out),) = branch_losses([branch], batch.targets, OBJECTIVES["auf"])
    assert "confidence_error" not in out.summary()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("confident", "from_anchor"), [(True, True), (False, False)])
def test_saved_and_read_back_and_not_mistaken_for_dflash(kind, confident, from_anchor, tmp_path: Path):
    changes = {"markov_head_type": kind, "enable_confidence_head": confident, "sample_from_anchor": from_anchor}
    drafter, vocabulary, batch, _ = five_blocks("dspark", **changes)
    drafter.save_pretrained(tmp_path)
    again = DSparkDrafter.from_pretrained(tmp_path)
    assert again.config == drafter.config
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["block_size"] == stored["dflash_config"]["block_size"] == (SLOTS if from_anchor else BLOCK)
    one, two = (d.branches(batch, vocabulary)[0] for d in (drafter, again))
    assert torch.equal(one.head(one.rows), two.head(two.rows))
    with pytest.raises(UserError, match=r"config.json is that of a dspark drafter, dflash expected"):
        DFlashDrafter.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("markov_rank", None, "markov_rank: missing in the drafter's config.json; it is no DSpark drafter"),
        ("markov_rank", "8", "markov_rank: '8', no int, in"),
        ("markov_head_type", "lstm", "markov_head_type: 'lstm' found, vanilla or gated or rnn expected"),
        ("enable_confidence_head", 1, "enable_confidence_head: 1, no bool, in"),
        ("confidence_head_with_markov", False, "confidence_head_with_markov: false in .* true expected"),
        ("sample_from_anchor", "yes", "sample_from_anchor: 'yes' in the drafter's config.json, true or false expected"),
    ],
)
def test_configs_that_mean_something_else_are_refused(field, value, message, tmp_path: Path):
    five_blocks("dspark")[0].save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    for place in (raw, raw["dflash_config"]):
        if field in place:
            place[field] = value
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=message):
        DSparkDrafter.from_pretrained(tmp_path)


def test_shapes_and_weights_without_meaning_are_refused():
    with pytest.raises(UserError, match=r"markov_rank: 0 found, at least 1 expected; .* train DRAFTER=dflash"):
        tiny_drafter("dspark", tiny_target(), markov_rank=0)
    with pytest.raises(UserError, match=r"confidence_weight: -1.0 found, a finite number from 0 expected"):
        DSparkSpec(confidence_weight=-1.0)
