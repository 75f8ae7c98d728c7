"""Every objective, plain and chunked, against Python loops in float64: value and gradient."""

import itertools

import pytest
import torch

from specauf.data.batch import BlockTargets
from specauf.errors import UserError
from specauf.objectives import (
    AcceptUntilFail,
    CrossEntropy,
    DPace,
    ExclusiveCut,
    ExpectedAcceptedLength,
    ExponentialDecay,
    ForwardKL,
    JensenShannon,
    LKHybrid,
    Mixture,
    NegativeLogAcceptance,
    Objective,
    ReverseKL,
    SoftTail,
    Survival,
    TotalVariation,
    Uniform,
    WarmUp,
    Weighting,
    block_loss,
)
from specauf.objectives.evidence import Evidence
from tests.objectives import reference
from tests.objectives.conftest import drafted_logits, random_targets

VOCAB, K, STEP = 6, 3, 4
WEIGHTINGS = {
    "uniform": Uniform(),
    "decay": ExponentialDecay(4.0),
    "auf": AcceptUntilFail(),
    "auf-decay": AcceptUntilFail(4.0),
    "exclusive": ExclusiveCut(),
    "soft-tail": SoftTail(3.0),
    "dpace-full": DPace(),
    "dpace-cumulative": DPace(part="cumulative"),
    "dpace-continuation": DPace(part="continuation"),
    "survival": Survival(),
    "warm-up": WarmUp(ExponentialDecay(4.0), AcceptUntilFail(), 10),
}
DIVERGENCES = {
    "ce": CrossEntropy(),
    "kl": ForwardKL(),
    "rkl": ReverseKL(),
    "js": JensenShannon(),
    "tv": TotalVariation(),
    "nla": NegativeLogAcceptance(),
    "lk-hybrid": LKHybrid(),
    "mixture": Mixture([CrossEntropy(), TotalVariation()], [0.1, 1.8]),
    "expected-length": ExpectedAcceptedLength(),
    "expected-length-label": ExpectedAcceptedLength("label"),
}


def edge_cases():
    """Blocks that once were bugs somewhere, one a row, then random ones."""
    targets, p = random_targets(20, 4, VOCAB, k=K)
    hit = torch.tensor(
        [
            [1, 1, 1, 1],  # all accepted
            [0, 0, 0, 0],  # all rejected
            [0, 1, 1, 1],  # the first slot fails
            [1, 1, 1, 0],  # the last slot fails
            [1, 1, 1, 1],  # invalid inside
            [1, 1, 1, 1],  # empty: padding block
            [1, 1, 0, 1],  # one-slot block
            [1, 1, 1, 1],  # ties, lost by the label
            [1, 1, 1, 1],  # ties, won by the label
        ]
    )
    valid = targets.valid.clone()
    valid[:9] = True
    valid[4, 2] = valid[5] = valid[6, 1:] = False
    labels = targets.labels.clone()
    labels[7], labels[8] = 5, 0
    targets = BlockTargets(labels, valid, targets.teacher_ids, targets.teacher_logprobs, targets.head_mass)
    logits = drafted_logits(targets, VOCAB)
    logits[:9] = torch.randn(9, 4, VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    spot = torch.where(hit.bool(), labels[:9], (labels[:9] + 1) % VOCAB)
    logits[:9].scatter_add_(-1, spot[..., None], torch.full((9, 4, 1), 6.0, dtype=torch.float64))
    logits[7:9] = 0.0
    return targets, p, logits.requires_grad_()


def one_slot():
    targets, p = random_targets(6, 1, VOCAB, k=K, seed=3)
    return targets, p, drafted_logits(targets, VOCAB).requires_grad_()


BATCHES = {"edges": edge_cases, "one-slot": one_slot}


def loop(weighting, divergence, reduction, batch, labels="data", failure="data", bound="lower", k=K):
    """Numerator and denominator with no tensor operation over more than one slot."""
    targets, p, logits = batch
    top1 = p.argmax(-1)
    weights, losses = [], []
    for b in range(len(logits)):
        valid = targets.valid[b]
        qs = [reference.softmax(row) for row in logits[b]]
        want = (targets.labels if labels == "data" else top1)[b].tolist()
        accept = (targets.labels if failure == "data" else top1)[b].tolist()
        greedy = [max(range(VOCAB), key=lambda v, row=row: (row[v].item(), -v)) for row in logits[b]]
        correct = torch.tensor([g == a for g, a in zip(greedy, accept, strict=True)])
        prob = [q[y].item() for q, y in zip(qs, want, strict=True)]
        alphas = [reference.acceptance(p[b, s], q, k, bound) for s, q in enumerate(qs)]
        auf, decay = reference.auf(correct, valid), reference.decay(valid, 4.0)
        weights.append(
            {
                "uniform": lambda v=valid: reference.uniform(v),
                "decay": lambda d=decay: d,
                "auf": lambda a=auf: a,
                "auf-decay": lambda a=auf, d=decay: [x * y for x, y in zip(a, d, strict=True)],
                "exclusive": lambda c=correct, v=valid: reference.exclusive(c, v),
                "soft-tail": lambda c=correct, v=valid: reference.soft_tail(c, v, 3.0),
                "dpace-full": lambda q=prob, v=valid: reference.dpace(q, v, 0.5, "full"),
                "dpace-cumulative": lambda q=prob, v=valid: reference.dpace(q, v, 0.5, "cumulative"),
                "dpace-continuation": lambda q=prob, v=valid: reference.dpace(q, v, 0.5, "continuation"),
                "survival": lambda a=alphas, v=valid: reference.survival([x.item() for x in a], v),
                "warm-up": lambda a=auf, d=decay: [0.6 * y + 0.4 * x for x, y in zip(a, d, strict=True)],
            }[weighting]()
        )
        if divergence.startswith("expected-length"):
            chance = alphas if divergence == "expected-length" else [q[y] for q, y in zip(qs, want, strict=True)]
            losses.append([-x for x in itertools.accumulate(chance, lambda x, y: x * y)])
        else:
            losses.append([reference.divergence(divergence, p[b, s], q, want[s], k, bound) for s, q in enumerate(qs)])
    return reference.reduce(weights, losses, targets.valid, reduction)


def check(weighting, divergence, batch, **settings):
    targets, p, logits = BATCHES[batch]()
    objective = Objective(WEIGHTINGS[weighting], DIVERGENCES[divergence], **settings)
    settings["bound"] = settings.pop("alpha_bound", "lower")
    reduction = settings.pop("reduction", "token")
    numerator, denominator = loop(weighting, divergence, reduction, (targets, p, logits), **settings)
    (expected,) = torch.autograd.grad(numerator, logits)
    assert expected.abs().max() > 1e-3
    for out in (
        objective.loss(logits, targets, STEP),
        block_loss(logits, lambda rows: rows, targets, objective, step=STEP, chunk_blocks=3),
        block_loss(logits, lambda rows: rows, targets, objective, step=STEP, every_slot=True),
    ):
        assert out.numerator.item() == pytest.approx(numerator.item(), rel=1e-10, abs=1e-10)
        assert out.denominator.item() == pytest.approx(denominator, rel=1e-10)
        assert not out.weights.requires_grad
        assert not out.denominator.requires_grad
        (gradient,) = torch.autograd.grad(out.numerator, logits)
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("reduction", ["token", "block", "block_sum"])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weightings(weighting, reduction, batch):
    check(weighting, "ce", batch, reduction=reduction)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("weighting", ["uniform", "auf", "survival"])
@pytest.mark.parametrize("divergence", [d for d in DIVERGENCES if d != "ce"])
def test_divergences(divergence, weighting, batch):
    check(weighting, divergence, batch)


@pytest.mark.parametrize("divergence", ["tv", "nla", "lk-hybrid", "expected-length"])
def test_upper_bound_of_alpha(divergence):
    check("survival", divergence, "edges", alpha_bound="upper")


@pytest.mark.parametrize(("labels", "failure"), [("teacher", "data"), ("data", "teacher"), ("teacher", "teacher")])
@pytest.mark.parametrize("weighting", ["auf", "dpace-full"])
def test_labels_and_failures_from_the_teacher(weighting, labels, failure):
    check(weighting, "ce", "edges", labels=labels, failure=failure)


def test_needs_teacher():
    assert not Objective(AcceptUntilFail(), CrossEntropy()).needs_teacher
    assert Objective(AcceptUntilFail(), CrossEntropy(), labels="teacher").needs_teacher
    assert Objective(AcceptUntilFail(), CrossEntropy(), failure="teacher").needs_teacher
    assert Objective(Survival(), CrossEntropy()).needs_teacher
    assert Objective(WarmUp(Uniform(), Survival()), CrossEntropy()).needs_teacher
    assert Objective(Uniform(), Mixture([CrossEntropy(), ForwardKL()], [1.0, 1.0])).needs_teacher
    assert not Objective(Uniform(), ExpectedAcceptedLength("label")).needs_teacher


def test_a_missing_teacher_is_named():
    targets, _ = random_targets(3, 2, VOCAB)
    logits = torch.zeros(3, 2, VOCAB)
    objective = Objective(Uniform(), ForwardKL())
    with pytest.raises(UserError, match=r"needs the target's top-k"):
        objective.loss(logits, targets)
    with pytest.raises(UserError, match=r"needs the target's top-k"):
        block_loss(logits, lambda rows: rows, targets, objective)
    some, _ = random_targets(3, 2, VOCAB, k=2)
    without_mass = BlockTargets(some.labels, some.valid, some.teacher_ids, some.teacher_logprobs)
    with pytest.raises(UserError, match="head_mass"):
        objective.loss(logits, without_mass)
    Objective(Uniform(), CrossEntropy(), labels="teacher").loss(logits, without_mass)


@pytest.mark.parametrize("field", ["labels", "failure", "reduction", "alpha_bound"])
def test_an_unknown_name_lists_the_known(field):
    with pytest.raises((UserError, TypeError)) as error:
        Objective(Uniform(), CrossEntropy(), **{field: "tokens"})
    assert "token" in str(error.value)


def test_the_values_of_invalid_slots_are_never_read():
    targets, _, logits = edge_cases()
    objective = Objective(Survival(), LKHybrid())
    clean = objective.loss(logits, targets)
    prefix = clean.valid
    dirty = BlockTargets(
        targets.labels.where(prefix, 10**6),
        targets.valid,
        targets.teacher_ids.where(prefix[..., None], 10**6),
        targets.teacher_logprobs.where(prefix[..., None], torch.nan),
        targets.head_mass.where(prefix, torch.nan),
    )
    for out in (objective.loss(logits, dirty), block_loss(logits, lambda rows: rows, dirty, objective)):
        assert out.numerator.item() == pytest.approx(clean.numerator.item(), rel=1e-12)
        (gradient,) = torch.autograd.grad(out.numerator, logits)
        assert torch.isfinite(gradient).all()


class Everywhere(Weighting):
    """Breaks its contract: it gives weight to slots that cannot be scored."""

    def __call__(self, evidence: Evidence, step: int) -> torch.Tensor:
        return torch.where(evidence.valid, 1.0, torch.nan).to(evidence.dtype)


class TooFew(Weighting):
    def __call__(self, evidence: Evidence, step: int) -> torch.Tensor:
        return torch.ones(evidence.valid.shape[:1])


def test_a_weighting_of_ones_own_cannot_count_what_is_not_valid() -> None:
    targets, _ = random_targets(20, 4, VOCAB)
    logits = drafted_logits(targets, VOCAB)
    own, plain = (Objective(w, CrossEntropy()).loss(logits, targets) for w in (Everywhere(), Uniform()))
    assert own.numerator == plain.numerator
    assert own.denominator == plain.denominator
    with pytest.raises(UserError, match="TooFew"):
        Objective(TooFew(), CrossEntropy()).loss(logits, targets)
