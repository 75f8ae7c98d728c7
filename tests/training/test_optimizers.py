"""MuonAdamW is torch's Muon and AdamW on their own parameters, and goes on from a checkpoint as if never stopped."""

import copy

import pytest
import torch
from torch import nn

from specauf.optimizers import MuonAdamW, orthogonalised


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.ParameterDict({"matrix": torch.randn(6, 4), "norm": torch.ones(4), "rows": torch.randn(200, 4)})


def run(parameters: nn.Module, *optimizers: torch.optim.Optimizer, steps: int, start: int = 0) -> None:
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for optimizer in optimizers:
            optimizer.step()


def same(one: nn.Module, two: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_each_parameter_moves_as_its_own_optimizer_says(monkeypatch) -> None:
    monkeypatch.setattr("specauf.optimizers.bfloat16_is_fast", lambda device: True)  # torch's knows nothing else
    ours, theirs = model(), model()
    run(ours, MuonAdamW(ours.parameters(), lr=0.01, weight_decay=0.1), steps=5)
    muon = torch.optim.Muon([theirs["matrix"]], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW([theirs["norm"], theirs["rows"]], lr=0.01, weight_decay=0.0, betas=(0.9, 0.95))
    run(theirs, muon, adam, steps=5)
    assert same(ours, theirs)


def test_it_goes_on_from_its_state() -> None:
    whole, broken = model(), model()
    run(whole, MuonAdamW(whole.parameters()), steps=6)
    first = MuonAdamW(broken.parameters())
    run(broken, first, steps=3)
    second = MuonAdamW(broken.parameters(), lr=9.0)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(broken, second, steps=3, start=3)
    assert same(whole, broken)


def test_a_schedule_drives_both_parts() -> None:
    still = model()
    optimizer = MuonAdamW(still.parameters())
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    before = copy.deepcopy(still)
    run(still, optimizer, steps=2)
    assert same(still, before)


def spectrum(matrix: torch.Tensor) -> torch.Tensor:
    return torch.linalg.svdvals(matrix.double())


@pytest.mark.parametrize("shape", [(5, 5), (4, 5), (4, 9), (9, 4), (1, 7), (40, 40), (30, 90)])
@pytest.mark.parametrize("fast", [False, True])
def test_singular_vectors_stay_and_values_come_near_one(shape, fast, monkeypatch) -> None:
    monkeypatch.setattr("specauf.optimizers.bfloat16_is_fast", lambda device: fast)
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    out = orthogonalised(matrix)
    assert out.dtype == (torch.bfloat16 if fast else torch.float32)
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    a, b, c = 3.4445, -4.7750, 2.0315
    expected = values / values.norm()
    for _ in range(5):
        expected = a * expected + b * expected**3 + c * expected**5
    close = {"atol": 0.05, "rtol": 0.05} if fast else {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(out.double(), left @ torch.diag(expected) @ right, **close)
    assert spectrum(out.float()).max() < 1.3


def test_without_fast_bfloat16_the_step_is_that_of_float32(monkeypatch) -> None:
    steps = []
    for fast in (False, True):
        monkeypatch.setattr("specauf.optimizers.bfloat16_is_fast", lambda device, fast=fast: fast)
        moved = model()
        run(moved, MuonAdamW(moved.parameters(), lr=0.01), steps=5)
        steps.append(moved["matrix"] - model()["matrix"])
    assert not torch.equal(*steps)
    torch.testing.assert_close(*steps, rtol=0.05, atol=2e-4)


def test_a_frozen_matrix_is_left_alone() -> None:
    frozen = model()
    optimizer = MuonAdamW(frozen.parameters(), lr=0.01, weight_decay=0.1)
    frozen["norm"].grad = torch.ones(4)
    optimizer.step()
    assert torch.equal(frozen["matrix"], model()["matrix"])
