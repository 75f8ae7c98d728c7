"""The chunked form has the plain form's value and gradient."""

import pytest
import torch
from torch import nn

from specauf.data.batch import BlockTargets
from specauf.objectives import (
    AcceptUntilFail,
    CrossEntropy,
    DPace,
    ExclusiveCut,
    ExpectedAcceptedLength,
    ExponentialDecay,
    ForwardKL,
    LKHybrid,
    Objective,
    Survival,
    Uniform,
    WarmUp,
    block_loss,
)
from tests.objectives.conftest import random_targets

BLOCKS, SLOTS, WIDTH, VOCAB = 37, 5, 16, 97

WEIGHTINGS = {
    "uniform": Uniform(),
    "decay": ExponentialDecay(4.0),
    "auf": AcceptUntilFail(),
    "auf-decay": AcceptUntilFail(4.0),
    "exclusive": ExclusiveCut(),
    "warming": WarmUp(ExponentialDecay(), AcceptUntilFail(), 10),
}


class Softcapped(nn.Module):
    def __init__(self, weight, trainable):
        super().__init__()
        self.weight = nn.Parameter(weight.clone(), requires_grad=trainable)

    def forward(self, rows):
        return 3 * torch.tanh(rows @ self.weight.T / 3)


def case(k=0, dtype=torch.float64, seed=0):
    """Rows and a head that predict the label in about 70 % of the slots."""
    targets, _ = random_targets(BLOCKS, SLOTS, VOCAB, k=k, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(VOCAB, WIDTH, generator=generator, dtype=torch.float64)
    rows = 0.3 * torch.randn(BLOCKS, SLOTS, WIDTH, generator=generator, dtype=torch.float64)
    hits = torch.rand(BLOCKS, SLOTS, 1, generator=generator) < 0.7
    rows = rows + 0.5 * weight[targets.labels] * hits
    return rows.to(dtype).requires_grad_(), weight.to(dtype), targets


def linear(weight, trainable=False):
    head = nn.Linear(*weight.T.shape, bias=False, dtype=weight.dtype)
    head.weight = nn.Parameter(weight.clone(), requires_grad=trainable)
    return head


def gradients(out, leaves):
    return torch.autograd.grad(2.5 * out.numerator, leaves)


def assert_equal(out, plain, tolerance):
    for field in ("numerator", "denominator", "weights"):
        torch.testing.assert_close(getattr(out, field), getattr(plain, field), rtol=tolerance, atol=tolerance)
    assert torch.equal(out.valid, plain.valid)
    assert torch.equal(out.correct[out.seen], plain.correct[out.seen])
    assert torch.equal(out.weights[~out.seen], torch.zeros_like(out.weights[~out.seen]))


@pytest.mark.parametrize("reduction", ["token", "block", "block_sum"])
@pytest.mark.parametrize("name", WEIGHTINGS)
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("make_head", [linear, Softcapped])
def test_chunked_equals_plain(name, reduction, trainable, make_head):
    rows, weight, targets = case()
    head = make_head(weight, trainable)
    objective = Objective(WEIGHTINGS[name], CrossEntropy(), reduction=reduction)
    leaves = [rows, *(p for p in head.parameters() if p.requires_grad)]
    plain = objective.loss(head(rows), targets, step=3)
    out = block_loss(rows, head, targets, objective, step=3, chunk_blocks=4)
    assert_equal(out, plain, 1e-10)
    for got, expected in zip(gradients(out, leaves), gradients(plain, leaves), strict=True):
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("weighting", [Survival(), AcceptUntilFail()])
@pytest.mark.parametrize("divergence", [ForwardKL(), LKHybrid(), ExpectedAcceptedLength()])
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("make_head", [linear, Softcapped])
def test_chunked_equals_plain_with_a_teacher(divergence, weighting, trainable, make_head):
    rows, weight, targets = case(k=5)
    head = make_head(weight, trainable)
    objective = Objective(weighting, divergence, failure="teacher", alpha_bound="upper")
    leaves = [rows, *(p for p in head.parameters() if p.requires_grad)]
    plain = objective.loss(head(rows), targets)
    out = block_loss(rows, head, targets, objective, chunk_blocks=4)
    assert_equal(out, plain, 1e-10)
    torch.testing.assert_close(out.alpha[out.seen], plain.alpha[out.seen])
    for got, expected in zip(gradients(out, leaves), gradients(plain, leaves), strict=True):
        assert expected.abs().max() > 1e-4
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("vocabulary", "gap"), [(6, 0.0), (50, 800.0)])
@pytest.mark.parametrize("divergence", [ForwardKL(), LKHybrid(), ExpectedAcceptedLength()])
def test_a_tail_of_the_drafter_that_is_zero_has_no_gradient(divergence, vocabulary, gap, dtype):
    """The teacher's 6 tokens are the whole vocabulary, or all others lie too far below to have a probability."""
    k = 6
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, SLOTS, vocabulary, generator=generator, dtype=dtype)
    logits[..., k:] -= gap
    probs, ids = (0.6 * torch.randn(3, SLOTS, k, generator=generator, dtype=dtype).softmax(-1)).sort(descending=True)
    labels = ids[..., 0].clone()
    targets = BlockTargets(labels, torch.ones(3, SLOTS).bool(), ids, probs.log(), probs.sum(-1))
    head = linear(torch.eye(vocabulary, dtype=dtype))
    rows = logits.requires_grad_()
    objective = Objective(DPace(), divergence, alpha_bound="upper")
    plain, out = objective.loss(head(rows), targets), block_loss(rows, head, targets, objective)
    (got,), (expected,) = gradients(out, [rows]), gradients(plain, [rows])
    assert got.isfinite().all()
    assert (got - expected).norm() <= 1e-6 * (1 + expected.norm())
    assert got.sum(-1).abs().max() <= 1e-4, "a softmax's gradient sums to 0"


@pytest.mark.parametrize("name", ["decay", "auf"])
def test_float32_agrees_to_one_millionth(name):
    rows, weight, targets = case(dtype=torch.float32)
    head = linear(weight)
    objective = Objective(WEIGHTINGS[name], CrossEntropy())
    plain, out = objective.loss(head(rows), targets), block_loss(rows, head, targets, objective, chunk_blocks=4)
    assert_equal(out, plain, 1e-6)
    (got,), (expected,) = gradients(out, [rows]), gradients(plain, [rows])
    assert (got - expected).norm() <= 1e-6 * expected.norm()


class CountingHead(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.register_buffer("weight", weight)
        self.forwarded, self.backwarded, self.largest = 0, 0, 0

    def forward(self, rows):
        logits = rows @ self.weight.T
        self.forwarded += len(rows)
        self.largest = max(self.largest, len(rows))
        if logits.requires_grad and len(rows):
            logits.register_hook(self.count)
        return logits

    def count(self, gradient):
        self.backwarded += int(gradient.abs().amax(-1).gt(0).sum())


def test_auf_runs_the_head_on_living_slots_only():
    rows, weight, targets = case()
    head = CountingHead(weight)
    objective = Objective(AcceptUntilFail(), CrossEntropy())
    support = int(objective.loss(rows @ weight.T, targets).weights.sum())
    out = block_loss(rows, head, targets, objective)
    assert support < 0.6 * int(out.valid.sum())
    assert head.backwarded == support
    assert support <= head.forwarded <= support + 2 * 16


def test_while_no_block_fails_ever_more_slots_are_tried_at_once():
    targets, _ = random_targets(40, 15, VOCAB)
    targets.valid[:] = True
    rows = torch.nn.functional.one_hot(targets.labels, VOCAB).double().requires_grad_()
    objective = Objective(AcceptUntilFail(), CrossEntropy())
    for failing, calls in ((None, [1, 2, 4, 8]), (4, [1, 2, 4, 1, 2, 4, 1])):
        sizes = []

        def head(x, sizes=sizes):
            if len(x):
                sizes.append(len(x))
            return 1.0 * x

        targets.labels[0] = rows[0].argmax(-1)
        if failing is not None:
            targets.labels[0, failing] += 1 - 2 * (targets.labels[0, failing] == VOCAB - 1)
        out = block_loss(rows, head, targets, objective, chunk_blocks=100)
        alive = [40] * 3 + [39] * 9 if failing is not None else [40] * 4
        assert sizes == [a * c for a, c in zip(alive, calls, strict=False)]
        assert_equal(out, objective.loss(rows, targets), 1e-12)


@pytest.mark.parametrize("name", ["decay", "auf"])
def test_the_largest_call_does_not_grow_with_the_blocks(name):
    rows, weight, targets = case()
    head = CountingHead(weight)
    block_loss(rows, head, targets, Objective(WEIGHTINGS[name], CrossEntropy()), chunk_blocks=4)
    assert 0 < head.largest <= 4 * SLOTS


def test_every_slot_shows_all_and_changes_nothing():
    rows, weight, targets = case()
    objective = Objective(AcceptUntilFail(), CrossEntropy())
    part = block_loss(rows, linear(weight), targets, objective)
    out = block_loss(rows, linear(weight), targets, objective, every_slot=True)
    assert torch.equal(out.seen, out.valid)
    assert int(part.seen.sum()) < int(out.seen.sum())
    assert_equal(part, out, 1e-12)
    assert "token_accuracy" in out.summary()
    assert "token_accuracy" not in part.summary()
    assert out.summary()["tau"] == part.summary()["tau"]


def test_no_graph_without_gradients():
    rows, weight, targets = case()
    head, objective = CountingHead(weight), Objective(AcceptUntilFail(), CrossEntropy())
    with torch.no_grad():
        out = block_loss(rows, head, targets, objective)
    assert not out.numerator.requires_grad
    torch.testing.assert_close(out.numerator, block_loss(rows, head, targets, objective).numerator.detach())


def test_a_callable_with_hidden_parameters_is_refused():
    rows, weight, targets = case()
    hidden = linear(weight, trainable=True)
    with pytest.raises(ValueError, match="plain callable"):
        block_loss(rows, lambda r: hidden(r), targets, Objective(Uniform(), CrossEntropy()))


def test_a_method_finds_its_owner():
    rows, weight, targets = case()
    head = linear(weight, trainable=True)
    out = block_loss(rows, head.forward, targets, Objective(Uniform(), CrossEntropy()))
    out.numerator.backward()
    assert head.weight.grad.abs().max() > 0


def test_identity_head_leaves_the_rows_alone():
    targets, _ = random_targets(BLOCKS, SLOTS, WIDTH)
    rows = torch.randn(BLOCKS, SLOTS, WIDTH, requires_grad=True)
    before = rows.detach().clone()
    objective = Objective(Uniform(), CrossEntropy())
    out = block_loss(rows, lambda r: r, targets, objective)
    assert torch.equal(rows, before)
    plain = objective.loss(rows, targets)
    torch.testing.assert_close(gradients(out, [rows]), gradients(plain, [rows]))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("divergence", [CrossEntropy(), ForwardKL(), LKHybrid()])
def test_half_precision_logits_make_a_float32_loss(half, divergence):
    rows, weight, targets = case(k=5, dtype=half)
    objective = Objective(Uniform(), divergence)
    head = linear(weight)
    out, plain = block_loss(rows, head, targets, objective), objective.loss(head(rows), targets)
    assert out.numerator.dtype == torch.float32
    torch.testing.assert_close(out.numerator, plain.numerator, rtol=1e-5, atol=1e-5)
    (got,), (expected,) = gradients(out, [rows]), gradients(plain, [rows])
    assert got.dtype == half
    assert (got - expected).float().norm() < 0.02 * expected.float().norm()


def test_autocast_runs_the_head_in_half_precision_and_the_loss_in_full():
    rows, weight, targets = case(dtype=torch.float32)
    head, objective = linear(weight, trainable=True), Objective(AcceptUntilFail(), CrossEntropy())
    full = block_loss(rows, head, targets, objective)
    with torch.autocast("cpu", torch.bfloat16):
        out = block_loss(rows, head, targets, objective)
    assert out.numerator.dtype == torch.float32
    torch.testing.assert_close(out.numerator, full.numerator, rtol=2e-2, atol=0)
    for got, expected in zip(*(gradients(o, [rows, head.weight]) for o in (out, full)), strict=True):
        assert got.dtype == torch.float32
        assert (got - expected).norm() < 0.1 * expected.norm()


def test_nothing_to_learn_is_zero_not_nan():
    rows, weight, targets = case()
    targets.valid[:] = False
    out = block_loss(rows, linear(weight), targets, Objective(AcceptUntilFail(), CrossEntropy()))
    out.numerator.backward()
    assert out.numerator == 0
    assert out.denominator == 0
    assert torch.equal(rows.grad, torch.zeros_like(rows))


@pytest.mark.gpu
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_cuda_equals_the_cpu(name):
    rows, weight, targets = case(k=5)
    objective = Objective(WEIGHTINGS[name], LKHybrid())
    expected = block_loss(rows, linear(weight), targets, objective, step=3)
    there = rows.detach().cuda().requires_grad_()
    out = block_loss(there, linear(weight).cuda(), targets.to("cuda"), objective, step=3)
    torch.testing.assert_close(out.numerator.cpu(), expected.numerator, rtol=1e-9, atol=1e-9)
    (got,), (wanted,) = gradients(out, [there]), gradients(expected, [rows])
    torch.testing.assert_close(got.cpu(), wanted, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", ["decay", "auf"])
def test_a_scaled_loss_may_exceed_fp16_where_its_gradient_does_not(name):
    rows, weight, targets = case(dtype=torch.float32)
    half = (rows.detach() / 64).half().requires_grad_()
    head, objective = linear(weight.half()), Objective(WEIGHTINGS[name], CrossEntropy())
    out = block_loss(half, head, targets, objective, chunk_blocks=4)
    (plain,) = torch.autograd.grad(out.numerator, half, retain_graph=True)
    scale = 2.0**17  # above 65504
    (scaled,) = torch.autograd.grad(out.numerator * (scale / 2**10), half, retain_graph=True)
    (huge,) = torch.autograd.grad(out.numerator * scale, half)
    assert torch.isfinite(scaled).all()
    small = plain.abs() < 0.4
    assert torch.isfinite(huge[small]).all()
    torch.testing.assert_close(huge[small].float() / scale, plain[small].float(), rtol=2e-3, atol=1e-7)
