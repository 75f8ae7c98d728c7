import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specauf.objectives import accept_until_fail, exclusive_cut, soft_tail
from specauf.objectives.auf import first_failure
from tests.objectives import reference

T, F = True, False


def rows(*values):
    return torch.tensor(values, dtype=torch.bool)


def test_published_example():
    """A public port's own test: predictions [1,9,3,8,5] of [1,2,3,4,5]; its first position is the anchor."""
    correct = torch.tensor([[1, 9, 3, 8, 5]]) == torch.tensor([[1, 2, 3, 4, 5]])
    drafted = correct[:, 1:]
    support = accept_until_fail(drafted, torch.ones_like(drafted))
    assert torch.cat([torch.zeros(1, 1), support], dim=1).bool().tolist() == [[F, T, F, F, F]]


@pytest.mark.parametrize(
    ("correct", "valid", "support"),
    [
        ([T, T, T, T], [T, T, T, T], [1, 1, 1, 1]),  # all accepted: everything
        ([F, F, F, F], [T, T, T, T], [1, 0, 0, 0]),  # all rejected: the first slot alone
        ([F, T, T, T], [T, T, T, T], [1, 0, 0, 0]),  # first slot fails
        ([T, T, T, F], [T, T, T, T], [1, 1, 1, 1]),  # last slot fails, and is inside
        ([T, F, T, F], [T, T, T, T], [1, 1, 0, 0]),  # the failing slot is inside, a later hit is not
        ([T, T, T, T], [T, T, F, T], [1, 1, 0, 0]),  # a hole ends the block
        ([T, T, T, T], [F, T, T, T], [0, 0, 0, 0]),  # nothing before the hole
        ([T, F, T, T], [T, F, T, T], [1, 0, 0, 0]),  # the failing slot is not supervised
        ([T, T, F, T], [T, T, F, F], [1, 1, 0, 0]),  # document ends inside the block
        ([T, T, T, T], [F, F, F, F], [0, 0, 0, 0]),  # padding block
    ],
)
def test_support(correct, valid, support):
    assert accept_until_fail(rows(correct), rows(valid)).tolist() == [support]


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=9))
def test_equals_the_loop(slots):
    correct, valid = rows([c for c, _ in slots]), rows([v for _, v in slots])
    inside = accept_until_fail(correct, valid, torch.float64)
    assert inside[0].tolist() == reference.auf(correct[0], valid[0])
    assert exclusive_cut(correct, valid, torch.float64)[0].tolist() == reference.exclusive(correct[0], valid[0])
    tail = soft_tail(correct, valid, 2.5, torch.float64)[0]
    assert tail.tolist() == pytest.approx(reference.soft_tail(correct[0], valid[0], 2.5), abs=1e-12)
    # The ablation differs by the failing slot and by nothing else.
    differ = (inside - exclusive_cut(correct, valid, torch.float64))[0]
    failed = first_failure(correct, valid)[0].item() - 1
    expected = torch.zeros_like(differ)
    if failed < len(slots) and reference.prefix_length(valid[0]) > failed:
        expected[failed] = 1
    assert torch.equal(differ, expected)
    # |support| = min(A + 1, valid slots): the emitted length, cut at the block's end.
    assert inside.sum() == min(failed + 1, reference.prefix_length(valid[0]))
    # A tail that vanishes at once is AUF.
    assert torch.equal(soft_tail(correct, valid, 1e-3, torch.float64), inside)


def test_what_is_after_the_failure_does_not_matter():
    valid = torch.ones(2**5, 5, dtype=torch.bool)
    correct = (torch.arange(2**5)[:, None] >> torch.arange(5)) & 1 == 1
    flipped = correct.clone()
    beyond = torch.arange(5) >= first_failure(correct, valid)[:, None]
    flipped[beyond] = ~flipped[beyond]
    assert torch.equal(accept_until_fail(correct, valid), accept_until_fail(flipped, valid))
