"""An optimizer step of SpecForge's own trainer beside ours: the same loss, and the same gradient of every parameter.

All in float64, except that SpecForge's norms and slot weights are float32; and its eager attention, whose mask of a
block that is not there would be infinite in its float32 softmax, runs in float32.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from specauf.data.batch import BlockBatch, BlockTargets
from specauf.data.blocks import eligible_anchors
from specauf.drafters import DFlashDrafter, DSparkDrafter, TargetVocabulary
from specauf.metrics.emitted import accepted_lengths
from specauf.objectives import (
    CrossEntropy,
    DPace,
    ExponentialDecay,
    Mixture,
    Objective,
    StepMean,
    TotalVariation,
    Uniform,
)
from specauf.objectives.dpace import Part
from specauf.objectives.evidence import valid_prefix
from specauf.objectives.support import branch_losses
from tests.drafters.tiny import MASK, VOCAB, TinyDocument, batch_of, tiny_drafter, tiny_target, vocabulary_of
from tests.interop.environments import run_in

pytestmark = pytest.mark.slow
TOLERANCE = {"sdpa": 5e-6, "eager": 2e-5}  # of the largest number of each gradient
DTYPES = {"sdpa": torch.float64, "eager": torch.float32}
# Blocks of each document: they hang over its end, and one document has fewer than the other.
ANCHORS = ([3, 4, 9, 15, 21, 25, 28], [6, 7, 11])
OTHERS = ([5, 12], [8])


class Step(NamedTuple):
    """One step: settings of SpecForge's training model, and the weighting that ours has instead."""

    kind: str
    weighting: Any
    settings: dict[str, Any]
    attention: str = "sdpa"
    base_share: float = 0.0  # Domino's lambda
    micro: int = 1
    holes: bool = False
    confidence: float = 0.0  # DSpark's weight of it


LOSS_TYPES: dict[Part, str] = {
    "full": "dpace",
    "cumulative": "dpace-cumulative-confidence-only",
    "continuation": "dpace-continuation-value-only",
}


def dpace(part: Part, smoothing: float = 0.5, **more: Any) -> Step:
    settings = {"loss_type": LOSS_TYPES[part], "dpace_alpha": smoothing}
    return Step("dflash", DPace(smoothing, part), settings, **more)


UNIFORM, DECAY = {"loss_decay_gamma": None}, {"loss_decay_gamma": 4.0}


def dspark(head: str, confidence: float = 0.5, **more: Any) -> Step:
    """DSpark's own loss: 0.1 cross-entropy, 0.9 of the distance |q - p|_1, and the confidence's."""
    settings = DECAY | {"dspark_confidence_head_alpha": confidence}
    return Step(f"dspark {head}", ExponentialDecay(4.0), settings, confidence=confidence, **more)


STEPS = {
    "uniform": Step("dflash", Uniform(), UNIFORM),
    "uniform, eager": Step("dflash", Uniform(), UNIFORM, "eager"),
    "decay": Step("dflash", ExponentialDecay(4.0), DECAY),
    "decay, two batches": Step("dflash", ExponentialDecay(4.0), DECAY, micro=2),
    "dpace": dpace("full"),
    "dpace, eager": dpace("full", 0.3, attention="eager"),
    "dpace, two batches": dpace("full", micro=2),
    "dpace, cumulative": dpace("cumulative"),
    "dpace, continuation": dpace("continuation"),
    "domino, base": Step("domino", ExponentialDecay(4.0), DECAY, base_share=1.0),
    "domino, both": Step("domino", ExponentialDecay(4.0), DECAY, base_share=0.5),
    "domino, both, eager": Step("domino", Uniform(), UNIFORM, "eager", base_share=0.5),
    "domino, final": Step("domino", ExponentialDecay(4.0), DECAY),
    "domino, two batches": Step("domino", ExponentialDecay(4.0), DECAY, base_share=0.5, micro=2),
    "dspark": dspark("vanilla"),
    "dspark, gated": dspark("gated"),
    "dspark, rnn": dspark("rnn"),
    "dspark, two batches": dspark("vanilla", micro=2),
    "dspark, tokens alone": dspark("rnn", 0.0),
    "uniform, holes": Step("dflash", Uniform(), UNIFORM, holes=True),
}
KINDS: dict[str, dict[str, Any]] = {
    "dflash": {},
    "domino": {},
    **{f"dspark {head}": {"markov_head_type": head} for head in ("vanilla", "gated", "rnn")},
}
DSPARK = Mixture([CrossEntropy(), TotalVariation()], [0.1, 1.8])
WHOLE = [name for name, step in STEPS.items() if not step.holes and (step.kind == "dflash" or step.micro == 1)]


class Found(NamedTuple):
    """What both sides made of a step."""

    drafter: DFlashDrafter
    vocabulary: TargetVocabulary
    batches: list[BlockBatch]
    theirs: dict[str, Any]

    @property
    def sequences(self) -> int:
        """Documents of all micro-batches."""
        return sum(len(batch.doc_offsets) - 1 for batch in self.batches)


def documents(holes: bool) -> list[TinyDocument]:
    random = np.random.default_rng(0)
    made = []
    for length, answer in ((31, range(3, 31)), (17, range(6, 15))):
        mask = np.isin(np.arange(length), list(answer))
        if holes:
            mask[random.choice(list(answer)[4:], 3, replace=False)] = False
        made.append(TinyDocument(length, random.integers(0, MASK, length), mask, random.standard_normal((length, 64))))
    return made


def last_hidden(tokens: Tensor) -> Tensor:
    """What stands for the target's last hidden states: of each token, so that packed documents have them too."""
    table = torch.randn(VOCAB, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return table[tokens]


def padded(some: list[TinyDocument], anchors: Sequence[list[int]], dtype: torch.dtype) -> dict[str, Tensor]:
    """Documents and blocks as SpecForge has them: one a row, and what is missing filled up."""
    longest, most = max(len(d.tokens) for d in some), max(map(len, anchors))
    found: dict[str, list[Tensor]] = {}
    for d, own in zip(some, anchors, strict=True):
        features = torch.from_numpy(d.features).to(dtype)
        given = {
            "input_ids": (torch.from_numpy(d.tokens), longest),
            "loss_mask": (torch.from_numpy(d.loss_mask).long(), longest),
            "anchors": (torch.tensor(own), most),
            "keep": (torch.ones(len(own), dtype=torch.bool), most),
        }
        row = {name: torch.nn.functional.pad(value, (0, size - len(value))) for name, (value, size) in given.items()}
        last = last_hidden(torch.from_numpy(d.tokens)).to(dtype)
        row["target_last_hidden_states"] = torch.nn.functional.pad(last, (0, 0, 0, longest - len(last)))
        row["hidden_states"] = torch.nn.functional.pad(features, (0, 0, 0, longest - len(features)))
        for name, value in row.items():
            found.setdefault(name, []).append(value)
    return {name: torch.stack(values) for name, values in found.items()}


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, Found]:
    folder = tmp_path_factory.mktemp("steps")
    torch.manual_seed(0)
    target = tiny_target()
    vocabulary = vocabulary_of(target)
    drafters: dict[str, Any] = {kind: tiny_drafter(kind.split()[0], target, **own) for kind, own in KINDS.items()}
    for kind, drafter in drafters.items():
        drafter.save_pretrained(folder / kind)
        drafter.double().train()
    tasks, batches = [], []
    for step in STEPS.values():
        some, chosen = documents(step.holes), (ANCHORS, OTHERS)[: step.micro]
        tasks.append(
            {
                "directory": str(folder / step.kind),
                "attention": step.attention,
                "settings": step.settings,
                "step": round((1 - step.base_share) * 8),
                "steps": 8,
                "micro": [padded(some, anchors, DTYPES[step.attention]) for anchors in chosen],
            }
        )
        made = [batch_of(some, list(anchors)) for anchors in chosen]
        batches.append([with_target(batch, vocabulary) for batch in made] if "dspark" in step.kind else made)
    heads = {"embedding": vocabulary.embedding.clone(), "head": vocabulary.head.clone()}
    torch.save(heads | {"tasks": tasks}, folder / "tasks.pt")
    run_in("specforge", "specforge_step.py", str(folder / "tasks.pt"), str(folder / "theirs.pt"))
    theirs = torch.load(folder / "theirs.pt", weights_only=True)
    return {
        name: Found(drafters[step.kind], vocabulary.double(), batch, answer)
        for (name, step), batch, answer in zip(STEPS.items(), batches, theirs, strict=True)
    }


def with_target(batch: BlockBatch, vocabulary: TargetVocabulary) -> BlockBatch:
    """The batch with the target's whole distribution, which SpecForge makes of its last hidden states."""
    slots = batch.anchors[:, None] + torch.arange(batch.targets.labels.shape[1])
    logits = last_hidden(batch.tokens)[slots.clamp(max=len(batch.tokens) - 1)] @ vocabulary.head.double().T
    chances, ids = logits.log_softmax(-1).sort(-1, descending=True)
    old = batch.targets
    return batch.with_targets(BlockTargets(old.labels, old.valid, ids, chances, torch.ones_like(chances[..., 0])))


class Ours(NamedTuple):
    """Loss and gradients as `DrafterModule` takes them, and what the first branch was divided by."""

    value: float
    grads: dict[str, Tensor]
    denominator: float


def our_step(found: Found, batches: list[BlockBatch], objective: Objective, base_share: float = 0.0) -> Ours:
    drafter = found.drafter
    drafter.zero_grad()
    means: dict[str, StepMean] = {}
    shares, denominators = {}, {}
    for batch in batches:
        loss = torch.zeros((), dtype=torch.float64)
        branches = drafter.branches(batch, found.vocabulary, 1 - base_share)
        for branch, out in branch_losses(branches, batch.targets, objective):
            mean = means.setdefault(branch.name, StepMean())
            loss = loss + branch.weight * mean.add(out.numerator, out.denominator)
            shares[branch.name] = branch.weight
            denominators[branch.name] = denominators.get(branch.name, 0.0) + out.denominator.item()
        loss.backward()
    assert len(batches) == 1 or len(means) == 1  # as the module asks for
    value = sum(shares[name] * mean.value.item() for name, mean in means.items())
    for mean in means.values():
        mean.finish(drafter.parameters())
    return Ours(value, gradients(drafter), next(iter(denominators.values())))


def gradients(drafter: DFlashDrafter) -> dict[str, Tensor]:
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in drafter.named_parameters()}


def compare(
    theirs: dict[str, Any], value: float, grads: dict[str, Tensor], factor: float = 1.0, attention: str = "sdpa"
) -> None:
    """SpecForge's loss and gradients are `factor` times these."""
    tolerance = TOLERANCE[attention]
    assert theirs["loss"] == pytest.approx(factor * value, rel=tolerance)
    assert theirs["grads"].keys() == grads.keys()
    for name, expected in grads.items():
        expected = factor * expected
        difference = (theirs["grads"][name] - expected).abs().max().item()
        assert difference <= tolerance * expected.abs().max().item(), name


@pytest.mark.parametrize("name", WHOLE)
def test_a_step_has_specforges_loss_and_gradients(found: dict[str, Found], name: str):
    step, this = STEPS[name], found[name]
    soft = isinstance(step.weighting, DPace)
    divergence = DSPARK if "dspark" in step.kind else CrossEntropy()
    objective = Objective(step.weighting, divergence, reduction="block_sum" if soft else "token")
    if isinstance(this.drafter, DSparkDrafter):
        this.drafter.confidence_weight = step.confidence
    ours = our_step(this, this.batches, objective, step.base_share)
    # SpecForge divides D-PACE by the number of sequences, `block_sum` by the number of blocks.
    compare(this.theirs, ours.value, ours.grads, ours.denominator / this.sequences if soft else 1.0, step.attention)
    silent = {n for n, grad in ours.grads.items() if not grad.any()}
    head = {n for n in ours.grads if n.startswith(("prefix_gru", "embed_proj"))}
    unsure = {n for n in ours.grads if n.startswith("confidence_head") and not step.confidence}
    assert silent == (head if step.base_share == 1.0 else unsure)


@pytest.mark.parametrize("name", ["dpace", "dpace, two batches"])
def test_dpace_by_weight_is_specforges_times_its_weight_by_sequence(found: dict[str, Found], name: str):
    this = found[name]
    ours = our_step(this, this.batches, Objective(STEPS[name].weighting, CrossEntropy()))
    compare(this.theirs, ours.value, ours.grads, ours.denominator / this.sequences)


def test_specforge_divides_dflash_by_all_batches_of_a_step_and_the_others_by_each(found: dict[str, Found]):
    for name, share in (("decay, two batches", 0.0), ("domino, two batches", 0.5), ("dspark, two batches", 0.0)):
        this = found[name]
        objective = Objective(ExponentialDecay(4.0), DSPARK if "dspark" in name else CrossEntropy())
        if isinstance(this.drafter, DSparkDrafter):
            this.drafter.confidence_weight = STEPS[name].confidence
        single = [our_step(this, [batch], objective, share) for batch in this.batches]
        losses = [ours.value for ours in single]
        assert this.theirs["losses"] == pytest.approx(losses, rel=TOLERANCE["sdpa"])
        mean = {n: sum(ours.grads[n] for ours in single) / len(single) for n in single[0].grads}
        far = max((this.theirs["grads"][n] - g).abs().max() / g.abs().max() for n, g in mean.items())
        if STEPS[name].kind != "dflash":
            assert far < TOLERANCE["sdpa"]
        else:
            assert far > 0.01  # that it is the mean over all slots says the test of whole steps


def test_specforge_counts_the_slots_behind_a_hole_and_we_do_not(found: dict[str, Found]):
    this = found["uniform, holes"]
    (batch,) = this.batches
    beyond = batch.targets.valid & ~valid_prefix(batch.targets.valid)
    assert beyond.any()
    ours = our_step(this, [batch], Objective(Uniform(), CrossEntropy()))
    assert this.theirs["loss"] != pytest.approx(ours.value, rel=1e-3)
    this.drafter.zero_grad()
    logits = this.vocabulary.logits(this.drafter(batch, this.vocabulary))
    valid = batch.targets.valid
    loss = torch.nn.functional.cross_entropy(logits[valid], batch.targets.labels[valid])
    loss.backward()
    compare(this.theirs, loss.item(), gradients(this.drafter))


def test_accepted_lengths_and_anchors_are_specforges(tmp_path: Path):
    random = np.random.default_rng(0)
    blocks, slots = 4000, 7
    # Three tokens, so that long prefixes are frequent; some blocks are wholly valid, some have tails, some holes.
    predicted, labels = torch.from_numpy(random.integers(0, 3, (2, blocks, slots)))
    predicted = torch.where(torch.from_numpy(random.random((blocks, slots)) < 0.6), labels, predicted)
    valid = torch.from_numpy(random.random((blocks, slots)) < 0.85)
    valid[: blocks // 4] = True
    valid[blocks // 4 : blocks // 2] = valid_prefix(valid[blocks // 4 : blocks // 2])
    masks = [torch.from_numpy(random.random(random.integers(9, 60)) < 0.7) for _ in range(40)]
    given = {"predicted": predicted.expand(2, -1, -1), "labels": labels.expand(2, -1, -1)}
    given["valid"] = torch.stack([valid, valid_prefix(valid)])
    # Its blocks begin with the anchor's slot, which is not valid.
    given = {name: torch.nn.functional.pad(value, (1, 0)) for name, value in given.items()}
    torch.save(given | {"loss_masks": masks}, tmp_path / "in.pt")
    run_in("specforge", "specforge_rules.py", str(tmp_path / "in.pt"), str(tmp_path / "out.pt"))
    theirs = torch.load(tmp_path / "out.pt", weights_only=True)
    counted = valid[:, 0]
    ours, _ = accepted_lengths(predicted == labels, valid)
    assert set(ours.tolist()) == set(range(slots + 1))
    as_given, as_ours = theirs["accepted"][:, counted].long()
    assert torch.equal(ours, as_ours)
    whole = (valid == valid_prefix(valid)).all(-1)[counted]
    assert torch.equal(ours[whole], as_given[whole])
    # Behind a hole it goes on counting, as if the hole had been accepted without being a token.
    assert (as_given >= ours).all()
    assert (as_given > ours)[~whole].float().mean() > 0.1
    # It also anchors at a document's first token, which has no context.
    for mask, anchors in zip(masks, theirs["anchors"], strict=True):
        assert [anchor for anchor in anchors if anchor > 0] == eligible_anchors(mask.numpy()).tolist()
    assert any(anchors[0] == 0 for anchors in theirs["anchors"])
