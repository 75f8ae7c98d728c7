"""The sparse forms against dense ones and against enumeration."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specauf.data.batch import BlockTargets
from specauf.objectives import (
    CrossEntropy,
    ExpectedAcceptedLength,
    ForwardKL,
    JensenShannon,
    Mixture,
    NegativeLogAcceptance,
    Objective,
    ReverseKL,
    TotalVariation,
    Uniform,
    block_loss,
)
from specauf.objectives.evidence import Teacher, acceptance_probability, read_logits

SEEDS = st.integers(0, 10_000)


def distributions(seed, blocks, slots, vocab, sharpness=2.0):
    """Draft logits and the target's distribution."""
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(blocks, slots, vocab, generator=generator, dtype=torch.float64)
    target = sharpness * torch.randn(blocks, slots, vocab, generator=generator, dtype=torch.float64)
    return logits, target.softmax(-1)


def kept(p, k):
    """Targets that hold the k most probable tokens of p; the label is p's most probable token."""
    top, ids = p.topk(k, dim=-1)
    valid = torch.ones(p.shape[:2], dtype=torch.bool)
    return BlockTargets(p.argmax(-1), valid, ids, top.log(), top.sum(-1))


def slot_losses(divergence, logits, p, k, bound="lower"):
    objective = Objective(Uniform(), divergence, alpha_bound=bound)
    return objective.loss(logits, kept(p, k)).losses


DENSE = {
    "kl": (ForwardKL(), lambda p, q: (p * (p / q).log()).sum(-1)),
    "rkl": (ReverseKL(), lambda p, q: (q * (q / p).log()).sum(-1)),
    "js": (
        JensenShannon(),
        lambda p, q: ((p * (2 * p / (p + q)).log()).sum(-1) + (q * (2 * q / (p + q)).log()).sum(-1)) / 2,
    ),
    "tv": (TotalVariation(), lambda p, q: (p - q).abs().sum(-1) / 2),
    "nla": (NegativeLogAcceptance(), lambda p, q: -torch.minimum(p, q).sum(-1).log()),
}


@pytest.mark.parametrize("name", DENSE)
@given(SEEDS, st.integers(2, 9))
def test_whole_vocabulary_is_the_dense_form(name, seed, vocab):
    logits, p = distributions(seed, 2, 3, vocab)
    divergence, dense = DENSE[name]
    logits.requires_grad_()
    expected = dense(p, logits.softmax(-1))
    out = Objective(Uniform(), divergence).loss(logits, kept(p, vocab))
    torch.testing.assert_close(out.losses, expected.detach(), rtol=1e-10, atol=1e-10)
    (found,) = torch.autograd.grad(out.numerator, logits)
    (wanted,) = torch.autograd.grad(expected.sum(), logits)
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", ["kl", "rkl", "js"])
@given(SEEDS, st.integers(1, 9))
def test_merging_the_tail_never_raises_a_divergence(name, seed, k):
    logits, p = distributions(seed, 2, 3, 9)
    divergence, dense = DENSE[name]
    sparse = slot_losses(divergence, logits, p, k)
    assert (sparse >= -1e-12).all()
    assert (sparse <= dense(p, logits.softmax(-1)) + 1e-10).all()


@given(SEEDS, st.integers(1, 9), st.floats(0.1, 8))
def test_bounds_hold_alpha_between_them(seed, k, sharpness):
    logits, p = distributions(seed, 2, 3, 9, sharpness)
    dense = torch.minimum(p, logits.softmax(-1)).sum(-1)
    low, high = (1 - slot_losses(TotalVariation(), logits, p, k, bound) for bound in ("lower", "upper"))
    assert (low <= dense + 1e-12).all()
    assert (dense <= high + 1e-12).all()
    more = 1 - slot_losses(TotalVariation(), logits, p, min(k + 1, 9), "lower")
    assert (low <= more + 1e-12).all()


def enumerated_length(p, q):
    """E[A] of a block by every draft and every outcome of verification: accept x with probability min(1, p/q)."""
    slots, vocab = p.shape
    expected = torch.zeros((), dtype=torch.float64)
    for draft in itertools.product(range(vocab), repeat=slots):
        drawn = torch.stack([q[s, x] for s, x in enumerate(draft)]).prod()
        for accepts in itertools.product([True, False], repeat=slots):
            chance, length = drawn, accepts.index(False) if False in accepts else slots
            for s, (x, accept) in enumerate(zip(draft, accepts, strict=True)):
                rate = (p[s, x] / q[s, x]).clamp(max=1)
                chance = chance * (rate if accept else 1 - rate)
            expected = expected + chance * length
    return expected


@pytest.mark.parametrize("seed", range(4))
def test_expected_length_is_the_enumerated_one(seed):
    logits, p = distributions(seed, 1, 3, 3, 1.0)
    logits.requires_grad_()
    expected = enumerated_length(p[0], logits[0].softmax(-1))
    (wanted,) = torch.autograd.grad(expected, logits)
    objective = Objective(Uniform(), ExpectedAcceptedLength(), reduction="block_sum")
    for out in (
        objective.loss(logits, kept(p, 3)),
        block_loss(logits, lambda rows: rows, kept(p, 3), objective),
    ):
        assert -(out.numerator / out.denominator).item() == pytest.approx(expected.item(), rel=1e-12)
        (gradient,) = torch.autograd.grad(-out.numerator, logits)
        torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-12)


def test_expected_length_by_label_is_enumerated_with_a_certain_target():
    logits, p = distributions(7, 1, 3, 3, 1.0)
    certain = torch.nn.functional.one_hot(p.argmax(-1), 3).double()
    objective = Objective(Uniform(), ExpectedAcceptedLength("label"), reduction="block_sum")
    out = objective.loss(logits, kept(p, 1))
    assert -out.numerator.item() == pytest.approx(enumerated_length(certain[0], logits[0].softmax(-1)).item())


def test_negative_log_acceptance_of_a_point_mass_is_cross_entropy():
    logits, p = distributions(1, 2, 3, 5)
    certain = torch.nn.functional.one_hot(p.argmax(-1), 5).double()
    targets = kept(certain, 1)
    nla, ce = (Objective(Uniform(), d).loss(logits, targets) for d in (NegativeLogAcceptance(), CrossEntropy()))
    torch.testing.assert_close(nla.losses, ce.losses)


def test_negative_log_acceptance_has_tv_gradient_over_alpha():
    logits, p = distributions(2, 1, 1, 6)
    logits.requires_grad_()
    nla, tv = (Objective(Uniform(), d).loss(logits, kept(p, 6)) for d in (NegativeLogAcceptance(), TotalVariation()))
    (found,) = torch.autograd.grad(nla.numerator, logits)
    (rejection,) = torch.autograd.grad(tv.numerator, logits)
    torch.testing.assert_close(found, rejection / (1 - tv.losses[0, 0]))


def restricted(seed=0, vocab=9, keep=6, k=4):
    """The same teacher seen by a drafter that lacks some tokens, written as the training module writes it."""
    logits, p = distributions(seed, 5, 3, vocab)
    dropped = torch.where(torch.arange(vocab) < keep, p, torch.zeros_like(p))
    targets = kept(p, k)
    known = targets.teacher_ids < keep
    logprobs = targets.teacher_logprobs.masked_fill(~known, -torch.inf)
    ids = targets.teacher_ids.where(known, 0)
    valid = targets.labels < keep
    labels = targets.labels.where(valid, 0)
    return logits[..., :keep], BlockTargets(labels, valid, ids, logprobs, logprobs.exp().sum(-1)), dropped, known


def test_tokens_outside_a_draft_vocabulary_belong_to_the_tail():
    logits, targets, p, known = restricted()
    assert (~known).any()
    assert (known.any(-1) & ~known.all(-1) & targets.valid).any()
    objective = Objective(Uniform(), Mixture([ForwardKL(), TotalVariation()], [1.0, 1.0]))
    logits.requires_grad_()
    q = logits.softmax(-1)
    numerator = torch.zeros((), dtype=torch.float64)
    for b, s in itertools.product(range(5), range(3)):
        if not targets.valid[b, : s + 1].all():
            continue
        ids = targets.teacher_ids[b, s][known[b, s]]
        head_p, head_q = p[b, s][ids], q[b, s][ids]
        tail_p, tail_q = 1 - head_p.sum(), 1 - head_q.sum()
        numerator = numerator + (head_p * (head_p / head_q).log()).sum() + tail_p * (tail_p / tail_q).log()
        numerator = numerator + 1 - torch.minimum(head_p, head_q).sum()
    (wanted,) = torch.autograd.grad(numerator, logits)
    for out in (objective.loss(logits, targets), block_loss(logits, lambda rows: rows, targets, objective)):
        assert out.numerator.item() == pytest.approx(numerator.item(), rel=1e-10)
        (gradient,) = torch.autograd.grad(out.numerator, logits)
        torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-10)


def test_a_top_token_outside_the_draft_vocabulary_is_a_failure_and_no_label():
    logits, targets, _, _ = restricted()
    lost = BlockTargets(
        targets.labels,
        torch.ones_like(targets.valid),
        targets.teacher_ids,
        targets.teacher_logprobs.index_fill(-1, torch.tensor([0]), -torch.inf),
        targets.head_mass,
    )
    failed = Objective(Uniform(), CrossEntropy(), failure="teacher").loss(logits, lost)
    assert failed.valid.all()
    assert not failed.correct.any()
    unlabelled = Objective(Uniform(), CrossEntropy(), labels="teacher").loss(logits, lost)
    assert not unlabelled.valid.any()


def test_a_slot_without_any_known_token_is_all_tail():
    logits, targets, _, _ = restricted()
    nothing = torch.full_like(targets.teacher_logprobs, -torch.inf)
    lost = BlockTargets(
        targets.labels,
        torch.ones_like(targets.valid),
        targets.teacher_ids,
        nothing,
        torch.zeros_like(targets.head_mass),
    )
    objective = Objective(Uniform(), ForwardKL())
    logits.requires_grad_()
    for out in (objective.loss(logits, lost), block_loss(logits, lambda rows: rows, lost, objective)):
        torch.testing.assert_close(out.losses, torch.zeros_like(out.losses))
        (gradient,) = torch.autograd.grad(out.numerator, logits)
        torch.testing.assert_close(gradient, torch.zeros_like(gradient))


class Scaled(Uniform):
    """Every slot counts so many times."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def __call__(self, evidence, step):
        return self.scale * super().__call__(evidence, step)


@pytest.mark.parametrize("divergence", [ReverseKL(), JensenShannon(), TotalVariation()], ids=lambda d: type(d).__name__)
@pytest.mark.parametrize("scale", [1.0, 4.0])  # weights above 1, as D-PACE gives
def test_a_token_that_the_drafter_rules_out_has_no_part_in_what_q_weighs(divergence, scale):
    targets = kept(torch.tensor([[[0.5, 0.3, 0.1, 0.1]]]), 3)
    objective = Objective(Scaled(scale), divergence)
    found = []
    for low in (-torch.inf, -80.0):  # e^-80 is nothing beside 1
        logits = torch.tensor([[[0.0, low, 1.0, 0.5]]], requires_grad=True)
        for out in (objective.loss(logits, targets), block_loss(logits, lambda rows: rows, targets, objective)):
            (gradient,) = torch.autograd.grad(out.numerator, logits)
            found.append(torch.cat([out.losses.reshape(-1), gradient.reshape(-1)]).detach())
    assert torch.isfinite(found[0]).all()
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_vanishing_tail_is_read_exactly(dtype):
    """1 - sum(head) would be rounding noise here; log q_tail is -60."""
    logits = torch.tensor([[[60.0, 60.0, 0.0, 0.0]]], dtype=dtype, requires_grad=True)
    p = torch.tensor([[[0.5, 0.4, 0.05, 0.05]]], dtype=dtype)
    targets = kept(p, 2)
    teacher = Teacher.of(targets, targets.valid, dtype)
    reading = read_logits(logits, targets.valid, targets.labels, teacher)
    assert reading.tail.item() == pytest.approx(-60.0, rel=1e-6)
    assert acceptance_probability(reading, teacher).item() == pytest.approx(0.9, rel=1e-6)
    objective = Objective(Uniform(), ForwardKL())
    for out in (objective.loss(logits, targets), block_loss(logits, lambda rows: rows, targets, objective)):
        (gradient,) = torch.autograd.grad(out.numerator, logits)
        # Forward KL's gradient is q - p on each outcome: the tail must be pulled up by its missing 0.1.
        torch.testing.assert_close(gradient, torch.tensor([[[0.0, 0.1, -0.05, -0.05]]], dtype=dtype))
