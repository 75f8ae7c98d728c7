"""States that every device can hold, and sums that lose nothing by it."""

import pytest
import torch

from specauf.metrics import (
    AcceptanceProbability,
    AcceptedLength,
    EmittedLength,
    SlotAcceptance,
    SupportRatio,
    TokenAccuracy,
)
from specauf.objectives.objective import LossOutput

METRICS = [
    AcceptedLength(),
    EmittedLength(),
    EmittedLength("prompt"),
    SlotAcceptance(3),
    TokenAccuracy("block"),
    TokenAccuracy("support"),
    SupportRatio(),
    AcceptanceProbability(),
]


@pytest.mark.parametrize("metric", METRICS, ids=lambda m: type(m).__name__)
def test_no_state_is_float64(metric):
    """Which Apple's MPS refuses, and with it the whole module."""
    states = metric.metric_state.values()
    assert states
    assert not [state.dtype for state in states if state.dtype == torch.float64]


def test_counts_beyond_float32_are_exact():
    metric = AcceptedLength()
    metric.update(torch.full((2**25,), 1, dtype=torch.int8))
    metric.update(torch.tensor([0, 1, 0]))
    assert (metric.total, metric.count) == (2**25 + 1, 2**25 + 3)


def test_means_of_prompts_are_those_of_float64():
    generator = torch.Generator().manual_seed(0)
    cycles = [torch.randint(0, 8, (1 + n % 7,), generator=generator) for n in range(1000)]
    metric = EmittedLength("prompt")
    for prompt in cycles:
        metric.update(prompt)
    expected = torch.stack([prompt.double().mean() for prompt in cycles]).mean().float() + 1
    assert metric.compute() == expected


def test_alpha_is_added_up_as_in_float64():
    alphas = [torch.rand(40, 7, generator=torch.Generator().manual_seed(n)) for n in range(100)]
    metric = AcceptanceProbability()
    for alpha in alphas:
        every = torch.ones_like(alpha, dtype=torch.bool)
        zero = torch.zeros(())
        metric.update(LossOutput(zero, zero, alpha, alpha, every, every, every, alpha))
    assert metric.compute() == (sum(a.sum().double() for a in alphas) / (100 * 40 * 7)).float()
