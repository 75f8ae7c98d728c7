import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from specauf.data.sampler import ShardBatchSampler

shards_strategy = st.lists(st.integers(1, 9), min_size=1, max_size=6)


def shards_of(sizes):
    ends = np.cumsum(sizes)
    return [list(range(end - size, end)) for size, end in zip(sizes, ends, strict=True)]


def sampler(sizes, batch_size=2, **options):
    return ShardBatchSampler(shards_of(sizes), batch_size, **({"shuffle": True, "seed": 3} | options))


@given(shards_strategy, st.integers(1, 3), st.integers(0, 2), st.integers(1, 3))
def test_an_epoch_reads_every_document_once(sizes, window, epoch, batch_size):
    s = sampler(sizes, batch_size, window=window, drop_last=False)
    s.start_at(epoch)
    batches = list(s)
    assert len(batches) == len(s)
    assert sorted(n for b in batches for n in b) == list(range(sum(sizes)))


@given(shards_strategy, st.integers(1, 3))
def test_two_ranks_share_the_batches_of_one(sizes, window):
    one = list(sampler(sizes, 4, window=window))
    two = [list(sampler(sizes, 2, window=window, rank=r, world=2)) for r in (0, 1)]
    assert [sorted(b) for b in one] == [sorted(a + b) for a, b in zip(*two, strict=True)]


def test_dropping_the_last_batch_drops_only_an_incomplete_one():
    assert len(sampler([4, 4])) == 4
    assert len(sampler([4, 5])) == 4
    assert all(len(b) == 2 for b in sampler([4, 5]))


def test_epochs_and_seeds_differ_and_repeat():
    first, again, other = sampler([20]), sampler([20]), sampler([20], seed=4)
    assert list(first) == list(again) != list(other)
    again.start_at(1)
    assert list(first) != list(again)


def test_a_window_keeps_few_shards_in_play():
    s = sampler([10] * 6, window=2)
    touched = [n // 10 for n in s.order()]
    switches = {tuple(sorted(set(touched[i : i + 20]))) for i in range(0, 60, 20)}
    assert all(len(pair) == 2 for pair in switches)


def test_skipping_goes_on_where_an_epoch_was_left():
    whole = list(sampler([10]))
    s = sampler([10])
    s.start_at(0, skip=3)
    assert list(s) == whole[3:]
    assert list(s) == whole
