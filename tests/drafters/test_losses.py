"""Every drafter trains with every loss; what a cache cannot give is refused in one line before the first step."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from specauf.checkpoint import load_drafter
from specauf.cli import main
from specauf.configs import known_configs
from specauf.data.batch import BlockBatch, BlockTargets
from specauf.errors import UserError
from specauf.objectives.support import branch_losses
from tests.drafters.tiny import MASK, TAPS, VOCAB, batch_of, document, tiny_drafter, tiny_target, vocabulary_of
from tests.objectives.test_configs import parser
from tests.training.conftest import write_tiny_cache
from tests.training.running import arguments

KINDS = ("dflash", "dflash2", "domino", "dspark", "masked")
LOSSES = known_configs("loss")


@pytest.fixture(scope="module")
def taught():
    """A batch with the target's top-k, its target, and its drafters."""
    torch.manual_seed(0)
    target = tiny_target()
    documents = [document(target, 5, 16, 1), document(target, 3, 14, 2)]
    batch = batch_of(documents, [[5, 9, 12], [4, 7]])
    return target, with_teacher(batch, target)


def with_teacher(batch: BlockBatch, target, k: int = 8) -> BlockBatch:
    """The target's own top-k for every slot, computed document by document."""
    rows = torch.cat(
        [
            target(batch.tokens[a:b][None]).logits[0].log_softmax(-1)
            for a, b in zip(batch.doc_offsets[:-1], batch.doc_offsets[1:], strict=True)
        ]
    )
    at = (batch.anchors[:, None] + torch.arange(batch.targets.labels.shape[1])).clamp(max=len(batch.tokens) - 1)
    logprobs, ids = rows[at].topk(k)
    return batch.with_targets(
        BlockTargets(batch.targets.labels, batch.targets.valid, ids, logprobs, logprobs.exp().sum(-1))
    )


def objective_of(loss: str):
    loaded = parser()
    return loaded.instantiate(loaded.parse_args([f"--model.loss=configs/loss/{loss}.yaml"])).model.loss


@pytest.mark.parametrize("loss", LOSSES)
def test_every_drafter_trains_with_every_loss(loss: str, taught):
    target, batch = taught
    objective = objective_of(loss)
    vocabulary = vocabulary_of(target)
    for kind in KINDS:
        torch.manual_seed(0)
        drafter = tiny_drafter(kind, target).train()
        before = {name: p.detach().clone() for name, p in drafter.named_parameters()}
        optimizer = torch.optim.SGD(drafter.parameters(), lr=1e-2)
        given = batch if drafter.needs_features else replace(batch, features=None)
        for step in range(2):
            total = torch.zeros(())
            for branch, out in branch_losses(
                drafter.branches(given, vocabulary, progress=0.5), batch.targets, objective, step=step
            ):
                # The ablation that leaves the failing slot out counts nothing while no slot is right.
                assert out.denominator > 0 or loss == "auf-exclusive"
                total = total + branch.weight * out.numerator / out.denominator.clamp_min(1e-9)
            optimizer.zero_grad()
            total.backward()
            assert torch.isfinite(total), (kind, loss)
            assert all(torch.isfinite(p.grad).all() for p in drafter.parameters())
            optimizer.step()
        if loss == "auf-exclusive":
            continue
        still = [name for name, p in drafter.named_parameters() if torch.equal(p, before[name])]
        assert not still, (kind, loss, still)


@pytest.mark.filterwarnings("ignore")  # Lightning's; a process of its own would take seconds
@pytest.mark.parametrize("kind", ["domino", "masked"])
def test_the_command_trains_it_and_its_run_loads(kind: str, tiny_cache: Path, tmp_path: Path):
    options = [f"--model.drafter={kind}", "--model.loss=auf", "--trainer.max_steps=2"]
    small = ["--model.drafter.init_args.gru_hidden_dim=8"] if kind == "domino" else []
    assert main(arguments(tiny_cache, tmp_path / "run", *options, *small)) == 0
    drafter = load_drafter(tmp_path / "run")
    assert drafter.name == kind
    logged = (tmp_path / "run/metrics.csv").read_text().splitlines()[0].split(",")
    assert ("train/final_tau" in logged) == (kind == "domino")


@pytest.mark.filterwarnings("ignore")
def test_a_cache_without_features_is_for_the_masked_drafter_alone(tmp_path: Path, capsys):
    cache = write_tiny_cache(tmp_path / "cache", documents=8, features="none")
    short = ("--model.loss=auf", "--trainer.max_steps=1", "--trainer.limit_val_batches=0")
    for kind in ("dflash", "domino"):
        assert main(arguments(cache, tmp_path / kind, f"--model.drafter={kind}", *short)) == 2
        error = capsys.readouterr().err
        assert f"features: none in the cache, the {kind} drafter needs them; train DRAFTER=masked" in error
        assert error.count("\n") == 1
    assert main(arguments(cache, tmp_path / "masked", "--model.drafter=masked", *short)) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", ["kl", "ce-teacher"])
def test_a_loss_that_needs_the_target_is_refused_without_it(kind: str, loss: str, taught):
    target, batch = taught
    drafter, vocabulary = tiny_drafter(kind, target), vocabulary_of(target)
    given = batch if drafter.needs_features else replace(batch, features=None)
    bare = BlockTargets(batch.targets.labels, batch.targets.valid)
    with pytest.raises(UserError, match="needs the target's top-k log-probs"):
        list(branch_losses(drafter.branches(given, vocabulary), bare, objective_of(loss)))


@pytest.mark.parametrize("kind", ["dflash", "domino"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"taps": (*TAPS, 1)}, "features: 64 given, 96 expected"),
        ({"vocab_size": VOCAB + 3}, f"vocab_size: {VOCAB} given, {VOCAB + 3} expected"),
        ({"hidden_size": 40}, "hidden_size: 32 given, 40 expected"),
    ],
)
def test_another_targets_batch_is_refused_with_both_values(kind: str, changes, message, taught):
    target, batch = taught
    if "hidden_size" in changes:
        target.config.hidden_size = 40
    try:
        drafter = tiny_drafter(kind, target, **{k: v for k, v in changes.items() if k != "hidden_size"})
    finally:
        target.config.hidden_size = 32
    with pytest.raises(UserError, match=message):
        drafter.branches(batch, vocabulary_of(target))


def test_the_masked_drafter_refuses_features():
    with pytest.raises(UserError, match="none expected by the masked drafter"):
        tiny_drafter("masked", tiny_target(), taps=(0, 1), mask_token_id=MASK)
