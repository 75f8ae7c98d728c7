"""MuonAdamW is torch's Muon and AdamW on their own parameters, and goes on from a checkpoint as if never stopped."""

import copy

import pytest
import torch
from torch import nn

from specauf.errors import UserError
from specauf.optimizers import MuonAdamW


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


def test_each_parameter_moves_as_its_own_optimizer_says() -> None:
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


def test_an_old_torch_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(UserError, match="has no Muon"):
        MuonAdamW(model().parameters())
