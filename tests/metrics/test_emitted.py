import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specauf.metrics import AcceptedLength, EmittedLength, SlotAcceptance, accepted_lengths

SLOTS = 4
CYCLES = st.lists(
    st.integers(0, SLOTS).flatmap(lambda possible: st.tuples(st.integers(0, possible), st.just(possible))), min_size=1
)


def loop_accepted(correct, valid):
    """A and reach of each block that has a valid slot, by walking along it."""
    found = []
    for row, ok in zip(correct.tolist(), valid.tolist(), strict=True):
        reach = ok.index(False) if False in ok else len(ok)
        hits = row[:reach]
        if reach:
            found.append((hits.index(False) if False in hits else reach, reach))
    return found


@given(st.lists(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=SLOTS, max_size=SLOTS), min_size=1))
def test_accepted_lengths_walk_along_the_block(blocks):
    correct = torch.tensor([[c for c, _ in block] for block in blocks])
    valid = torch.tensor([[v for _, v in block] for block in blocks])
    accepted, possible = accepted_lengths(correct, valid)
    assert list(zip(accepted.tolist(), possible.tolist(), strict=True)) == loop_accepted(correct, valid)


def test_emitted_is_accepted_plus_the_targets_token():
    accepted, emitted = AcceptedLength(), EmittedLength()
    for metric in (accepted, emitted):
        metric.update(torch.tensor([0, 3, 1]))
        metric.update(torch.tensor([0]))
    assert accepted.compute() == 1
    assert emitted.compute() == 2


def test_pooled_and_per_prompt_means_differ():
    pooled, prompt = EmittedLength(), EmittedLength(average="prompt")
    for metric in (pooled, prompt):
        metric.update(torch.tensor([0, 0, 0]))
        metric.update(torch.tensor([4]))
        metric.update(torch.tensor([], dtype=torch.long))
    assert pooled.compute() == 2
    assert prompt.compute() == 3


def test_nothing_decoded_is_plain_decoding():
    metric = EmittedLength()
    metric.update(torch.tensor([], dtype=torch.long))
    assert metric.compute() == 1


@given(CYCLES)
def test_slot_acceptance_counts(cycles):
    metric = SlotAcceptance(SLOTS)
    accepted, possible = (torch.tensor(column) for column in zip(*cycles, strict=True))
    metric.update(accepted[:2], possible[:2])
    metric.update(accepted[2:], possible[2:])
    rates = metric.compute()
    for k in range(1, SLOTS + 1):
        could = [a for a, p in cycles if p >= k]
        alive = [a for a in could if a >= k - 1]
        hit = sum(a >= k for a in could)
        assert rates["survival"][k - 1].item() == pytest.approx(hit / len(could) if could else 0)
        assert rates["conditional"][k - 1].item() == pytest.approx(hit / len(alive) if alive else 0)
        assert rates["reached"][k - 1] == len(alive)


def test_survival_is_the_product_of_conditionals_and_sums_to_accepted():
    accepted = torch.tensor([0, 1, 4, 2, 4, 3, 0])
    metric, mean = SlotAcceptance(SLOTS), AcceptedLength()
    metric.update(accepted)
    mean.update(accepted)
    rates = metric.compute()
    torch.testing.assert_close(rates["conditional"].cumprod(0), rates["survival"])
    torch.testing.assert_close(rates["survival"].sum(), mean.compute())


def test_mean_accuracies_multiplied_are_biased_low():
    """Why the product is taken per block: one easy block and one hard one."""
    correct = torch.tensor([[True] * SLOTS, [False] * SLOTS])
    metric = AcceptedLength()
    metric.update(accepted_lengths(correct, torch.ones_like(correct))[0])
    assert metric.compute() == 2
    assert correct.float().mean(0).cumprod(0).sum() < 1
