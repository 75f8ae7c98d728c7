import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specauf.errors import UserError
from specauf.objectives import (
    AcceptUntilFail,
    DPace,
    ExclusiveCut,
    ExponentialDecay,
    SoftTail,
    Survival,
    Uniform,
    WarmUp,
    dpace,
    exponential_decay,
    survival,
    uniform,
)
from specauf.objectives.evidence import Evidence, valid_prefix
from tests.objectives import reference

SLOT = st.tuples(st.booleans(), st.booleans(), st.floats(0, 1))
BLOCK = st.lists(SLOT, min_size=1, max_size=8)
WEIGHTINGS = [
    Uniform(),
    ExponentialDecay(),
    AcceptUntilFail(),
    AcceptUntilFail(7.0),
    ExclusiveCut(),
    SoftTail(),
    DPace(),
    Survival(),
    WarmUp(ExponentialDecay(), AcceptUntilFail(), 10),
]


def columns(block):
    correct, valid, prob = zip(*block, strict=True)
    return torch.tensor([correct]), torch.tensor([valid]), torch.tensor([prob], dtype=torch.float64)


@given(BLOCK, st.floats(0.1, 20), st.floats(0, 1), st.sampled_from(["full", "cumulative", "continuation"]))
def test_each_equals_its_loop(block, gamma, alpha, part):
    _, valid, prob = columns(block)
    ok, probs = valid[0], prob[0].tolist()

    def same(found, expected):
        torch.testing.assert_close(found[0], torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-10)

    same(uniform(valid, torch.float64), reference.uniform(ok))
    same(exponential_decay(valid, gamma, torch.float64), reference.decay(ok, gamma))
    same(survival(prob, valid), reference.survival(probs, ok))
    same(dpace(prob, valid, alpha, part), reference.dpace(probs, ok, alpha, part))


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=lambda w: type(w).__name__)
@given(block=BLOCK)
def test_no_gradient_flows_through_a_weight(weighting, block):
    correct, valid, prob = columns(block)
    prob.requires_grad_()
    prefix = valid_prefix(valid)
    weights = weighting(Evidence(prefix, correct & prefix, prob, prob), 3)
    assert not weights.requires_grad
    assert weights.dtype == torch.float64
    assert torch.equal(weights[~prefix], torch.zeros_like(weights[~prefix]))
    assert (weights >= 0).all()


def test_dpace_is_the_gradient_of_the_expected_prefix():
    """With alpha 0, sum_k w_k grad(log q_k) is the gradient of sum_k prod_{i<=k} q_i."""
    log_q = torch.randn(3, 6, dtype=torch.float64).abs().neg().requires_grad_()
    log_q.exp().cumprod(-1).sum().backward()
    weights = dpace(log_q.exp(), torch.ones(3, 6, dtype=torch.bool), alpha=0.0)
    torch.testing.assert_close(weights, log_q.grad)


def test_auf_is_dpace_with_certainty_for_probability():
    """The identity of the notes: cumulative confidence with a hard s, moved one slot on."""
    correct = torch.rand(50, 6) > 0.4
    valid = torch.ones_like(correct)
    certain = dpace(correct.double(), valid, alpha=0.0, part="cumulative")
    shifted = torch.cat([torch.ones(50, 1, dtype=torch.float64), certain[:, :-1]], -1)
    evidence = Evidence(valid, correct, correct.double())
    assert torch.equal(AcceptUntilFail()(evidence, 0), shifted)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "switch"])
def test_warm_up_goes_from_one_to_the_other(schedule):
    before, after = ExponentialDecay(4.0), AcceptUntilFail()
    weighting = WarmUp(before, after, 10, schedule)
    correct = torch.tensor([[True, False, True]])
    evidence = Evidence(torch.ones_like(correct), correct, torch.ones(1, 3))
    first, last = before(evidence, 0), after(evidence, 0)
    assert torch.equal(weighting(evidence, 0), first)
    assert torch.equal(weighting(evidence, 10), last)
    assert torch.equal(weighting(evidence, 99), last)
    middle = {"linear": 0.5, "cosine": 0.5, "switch": 0.0}[schedule]
    torch.testing.assert_close(weighting(evidence, 5), (1 - middle) * first + middle * last)
    shares = [weighting.progress(step) for step in range(12)]
    assert shares == sorted(shares)
    assert not weighting.stops_at_failure(9)
    assert weighting.stops_at_failure(10)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: ExponentialDecay(0.0), "gamma"),
        (lambda: AcceptUntilFail(-1.0), "decay_gamma"),
        (lambda: SoftTail(0.0), "tail_gamma"),
        (lambda: DPace(1.5), "smoothing"),
        (lambda: WarmUp(Uniform(), Uniform(), 0), "warmup_steps"),
    ],
)
def test_impossible_settings_are_refused(make, field):
    with pytest.raises(UserError, match=f"loss {field} is .*give"):
        make()
