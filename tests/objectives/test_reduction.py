"""1 and 2 ranks, and any cut into micro-batches, give one gradient; two ranks' metrics agree with one's."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from specauf.metrics import (
    AcceptanceProbability,
    EmittedLength,
    SlotAcceptance,
    SupportRatio,
    TokenAccuracy,
    accepted_lengths,
)
from specauf.objectives import (
    AcceptUntilFail,
    CrossEntropy,
    DPace,
    ExponentialDecay,
    Objective,
    StepMean,
    block_loss,
    global_mean,
)
from tests import processes
from tests.objectives.conftest import drafted_logits, random_targets

BLOCKS, SLOTS, VOCAB = 24, 4, 13
# The second block has no valid slot.
CUTS = {"halves": [12, 12], "uneven": [3, 16, 4, 1], "with-an-empty-one": [1, 1, 22]}
OBJECTIVES = {
    "auf": Objective(AcceptUntilFail(), CrossEntropy()),
    "auf-block": Objective(AcceptUntilFail(), CrossEntropy(), reduction="block"),
    "dpace": Objective(DPace(), CrossEntropy(), reduction="block_sum"),
    "decay": Objective(ExponentialDecay(4.0), CrossEntropy()),
}


def data():
    targets, _ = random_targets(BLOCKS, SLOTS, VOCAB, k=3, seed=1)
    return targets, drafted_logits(targets, VOCAB, seed=1)


class Drafter(nn.Module):
    """The smallest thing with a parameter: shifts the logits."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.linspace(-0.5, 0.5, VOCAB, dtype=torch.float64))

    def forward(self, logits):
        return logits + self.shift


def loss_of(drafter, part, objective, every_slot=False):
    targets, logits = data()
    return block_loss(drafter(logits[part]), lambda rows: rows, targets[part], objective, every_slot=every_slot)


def whole(objective):
    drafter = Drafter()
    out = loss_of(drafter, slice(None), objective)
    loss = out.numerator / out.denominator
    loss.backward()
    return loss.item(), drafter.shift.grad


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_any_cut_into_micro_batches_gives_one_gradient(name, cut):
    objective, drafter, mean, start = OBJECTIVES[name], Drafter(), StepMean(), 0
    for size in CUTS[cut]:
        out = loss_of(drafter, slice(start, start + size), objective)
        mean.add(out.numerator, out.denominator).backward()
        start += size
    value = mean.finish(drafter.parameters())
    expected, gradient = whole(objective)
    assert value.item() == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(drafter.shift.grad, gradient, rtol=1e-12, atol=1e-14)


def test_a_mean_of_means_is_another_gradient():
    """Why `StepMean` exists: the halves have different denominators."""
    drafter = Drafter()
    for part in (slice(0, 3), slice(3, None)):
        out = loss_of(drafter, part, OBJECTIVES["auf"])
        (global_mean(out.numerator, out.denominator) / 2).backward()
    assert (drafter.shift.grad - whole(OBJECTIVES["auf"])[1]).norm() > 1e-3


def test_a_step_without_any_weight_is_zero():
    numerator = torch.zeros((), requires_grad=True)
    loss = global_mean(numerator * 1, torch.zeros(()))
    loss.backward()
    assert loss == 0
    assert torch.isfinite(numerator.grad)


def update_metrics(metrics, out):
    accepted, possible = accepted_lengths(out.correct, out.valid)
    metrics["tau"].update(accepted)
    metrics["slots"].update(accepted, possible)
    for name in ("accuracy", "support_accuracy", "support_ratio", "alpha"):
        metrics[name].update(out)


def make_metrics():
    return {
        "tau": EmittedLength(),
        "slots": SlotAcceptance(SLOTS),
        "accuracy": TokenAccuracy("block"),
        "support_accuracy": TokenAccuracy("support"),
        "support_ratio": SupportRatio(),
        "alpha": AcceptanceProbability(),
    }


def on_one_of_two_ranks(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    part = (slice(0, 7), slice(7, None))[rank]
    found = {}
    for name, objective in OBJECTIVES.items():
        drafter = DistributedDataParallel(Drafter())
        out = loss_of(drafter, part, objective)
        loss = global_mean(out.numerator, out.denominator)
        loss.backward()
        found[name] = (loss.item(), drafter.module.shift.grad)

        drafter, mean = DistributedDataParallel(Drafter()), StepMean()
        middle = (part.start + (part.stop or BLOCKS)) // 2
        with drafter.no_sync():
            out = loss_of(drafter, slice(part.start, middle), objective)
            mean.add(out.numerator, out.denominator).backward()
        out = loss_of(drafter, slice(middle, part.stop), objective)
        mean.add(out.numerator, out.denominator).backward()
        value = mean.finish(drafter.parameters())
        found[f"{name} in micro-batches"] = (value.item(), drafter.module.shift.grad)
    metrics = make_metrics()
    update_metrics(metrics, loss_of(Drafter(), part, OBJECTIVES["auf"], every_slot=True))
    found["metrics"] = {name: metric.compute() for name, metric in metrics.items()}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads may outlive their group, and would abort the interpreter's orderly end


def test_two_ranks_are_one(tmp_path):
    mp.start_processes(on_one_of_two_ranks, (str(tmp_path),), nprocs=2, start_method=processes.METHOD)
    metrics = make_metrics()
    update_metrics(metrics, loss_of(Drafter(), slice(None), OBJECTIVES["auf"], every_slot=True))
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(found.pop("metrics"), {name: metric.compute() for name, metric in metrics.items()})
        assert len(found) == 2 * len(OBJECTIVES)
        for name, (loss, gradient) in found.items():
            expected, wanted = whole(OBJECTIVES[name.split(" ")[0]])
            assert loss == pytest.approx(expected, rel=1e-12)
            torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-14)
