"""Reading order: every document once for any number of readers, shuffled by (seed, epoch), resumed exactly."""

import functools
import pickle
import threading

import fsspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from specauf.cache import Cache, open_cache
from specauf.errors import UserError
from tests.cache.making import build, identity

LENGTHS = [[4, 3, 6, 2, 5, 3, 7], [3], [5, 5, 2, 9], [3, 3, 3, 3, 3, 3], [8, 2]]
DOCUMENTS = sum(map(len, LENGTHS))


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Cache:
    folder = tmp_path_factory.mktemp("order") / "cache"
    build(folder, identity(features="none"), LENGTHS)
    return open_cache(str(folder))


@pytest.fixture(scope="module")
def quick(cache) -> Cache:
    """The same cache with every shard read once: what is tested is the order."""
    opened = open_cache(cache.url)
    opened.shard = functools.cache(opened.shard)  # type: ignore[method-assign]
    return opened


def numbers(cache: Cache, **options) -> list[int]:
    return [d.index for d in cache.documents(topk=False, **options)]


@given(
    seed=st.integers(0, 2**63),
    epoch=st.integers(0, 1000),
    world=st.integers(1, 30),
    window=st.integers(1, 7),
    shuffle=st.booleans(),
    split=st.sampled_from([None, "train", "held_out"]),
)
def test_readers_cover_the_epoch_once(quick, seed, epoch, world, window, shuffle, split):
    options = {"seed": seed, "epoch": epoch, "window": window, "shuffle": shuffle, "split": split}
    parts = [numbers(quick, rank=rank, world=world, **options) for rank in range(world)]
    whole = numbers(quick, **options)
    assert [n for part in parts for n in part] == whole
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    held_out = {d.index for d in quick.documents(topk=False) if d.held_out}
    everything = set(range(DOCUMENTS))
    assert len(whole) == len(set(whole))
    assert set(whole) == {None: everything, "train": everything - held_out, "held_out": held_out}[split]


def test_lengths_are_known_without_reading(cache):
    for split in (None, "train", "held_out"):
        assert len(cache.documents(split=split, rank=1, world=3)) == len(numbers(cache, split=split, rank=1, world=3))


def test_the_order_depends_on_seed_and_epoch_alone(cache):
    first = numbers(cache, shuffle=True, seed=1, epoch=0, window=5)
    assert first == numbers(cache, shuffle=True, seed=1, epoch=0, window=5)
    others = [numbers(cache, shuffle=True, seed=s, epoch=e, window=5) for s, e in ((1, 1), (2, 0), (0, 1))]
    assert all(other != first for other in others)
    assert numbers(cache) == list(range(DOCUMENTS))
    assert np.abs(np.diff(first)).mean() > 3, "documents of different shards mix within a window"


@given(st.integers(0, DOCUMENTS), st.integers(1, 3), st.integers(1, 3))
def test_a_saved_position_goes_on_exactly(quick, read, window, world):
    options = {"shuffle": True, "seed": 3, "epoch": 2, "window": window, "world": world, "rank": world - 1}
    whole = quick.documents(**options)
    expected = [d.index for d in whole]
    started = quick.documents(**options)
    head = [next(started).index for _ in range(min(read, len(expected)))]
    resumed = quick.documents(**options)
    resumed.load_state_dict(pickle.loads(pickle.dumps(started.state_dict())))
    assert head + [d.index for d in resumed] == expected


def test_a_cache_travels_to_other_processes(cache):
    assert pickle.loads(pickle.dumps(cache)).fingerprint == cache.fingerprint


def test_resuming_reads_no_shard_that_is_behind(cache, monkeypatch):
    options = {"shuffle": True, "seed": 3, "window": 1}
    started = cache.documents(**options)
    for _ in range(DOCUMENTS - 1):
        next(started)
    read = []
    monkeypatch.setattr(
        Cache, "shard", lambda self, n, fields, shard=Cache.shard: read.append(n) or shard(self, n, fields)
    )
    resumed = cache.documents(**options)
    resumed.load_state_dict(started.state_dict())
    assert len(list(resumed)) == 1
    assert len(read) == 1


@pytest.fixture(scope="module")
def remote(cache) -> Cache:
    url = "memory://order"
    fsspec.filesystem("memory").put(cache.url, "/order", recursive=True)
    return open_cache(url)


def test_a_remote_store_gives_the_same_order(cache, remote):
    options = {"shuffle": True, "seed": 3, "window": 2, "rank": 1, "world": 2}
    assert numbers(remote, **options) == numbers(cache, **options)


@pytest.mark.parametrize("store", ["local", "memory"])
def test_damage_ahead_is_told_when_it_is_reached(tmp_path, store):
    """Remote shards are read ahead: what is wrong with one must not cost the documents before it."""
    build(tmp_path / "cache", identity(features="none"), LENGTHS)
    (tmp_path / "cache/shard-00002.zarr/tokens/c/0").unlink()
    url = str(tmp_path / "cache")
    if store == "memory":
        fsspec.filesystem("memory").put(url, f"/{tmp_path.name}", recursive=True)
        url = f"memory://{tmp_path.name}"
    documents = open_cache(url).documents()
    assert [next(documents).index for _ in range(8)] == list(range(8))
    with pytest.raises(UserError, match="shard-00002: field tokens"):
        next(documents)


def test_a_reader_that_stops_early_waits_for_nothing(remote, monkeypatch):
    """The thread that reads ahead may be in the middle of a slow shard."""
    reading, release = threading.Event(), threading.Event()

    def slow(self: Cache, number: int, fields: object, shard=Cache.shard) -> object:
        if threading.current_thread() is not threading.main_thread():
            reading.set()
            assert release.wait(60)
        return shard(self, number, fields)

    monkeypatch.setattr(Cache, "shard", slow)
    documents = remote.documents()
    assert next(documents).index == 0
    assert reading.wait(60)
    documents._documents.close()
    assert not release.is_set(), "closing came back while the next shard is still being read"
    release.set()


@pytest.mark.parametrize(
    ("name", "options"),
    [("seed", {"seed": 4}), ("world", {"world": 2}), ("split", {"split": "train"}), ("window", {"window": 2})],
)
def test_a_position_of_other_settings_is_refused(cache, name, options):
    state = cache.documents(shuffle=True, seed=3).state_dict()
    with pytest.raises(UserError, match=f"{name} is .* now "):
        cache.documents(**{"shuffle": True, "seed": 3, **options}).load_state_dict(state)


def test_a_rank_outside_the_world_is_refused(cache):
    with pytest.raises(UserError, match="rank is 3, expected 0 to 2"):
        cache.documents(rank=3, world=3)


def test_single_documents_keep_few_shards(cache):
    for number in (0, DOCUMENTS - 1, 9, 3, 8):
        document = cache.document(number, shards_in_memory=2)
        assert document.index == number
        assert len(cache._shards) <= 2
    with pytest.raises(IndexError):
        cache.document(DOCUMENTS)


def test_masks_and_counts_without_documents(cache):
    for split in ("train", "held_out"):
        found = {n: m for shard in cache.loss_masks(split) for n, m in shard}
        expected = {d.index: d.loss_mask for d in cache.documents(split=split)}
        assert found.keys() == expected.keys()
        assert all((found[n] == expected[n]).all() for n in found)
    counts = np.zeros(300, np.int64)
    for d in cache.documents(split="train"):
        np.add.at(counts, d.tokens[d.loss_mask], 1)
    np.testing.assert_array_equal(cache.supervised_token_counts(), counts)


def test_a_remote_store_is_asked_for_several_shards_at_once_and_they_come_in_order(monkeypatch):
    url = "memory://order-of-masks"
    build(url, identity(features="none"), LENGTHS)
    cache = open_cache(url)
    both, read = threading.Barrier(2, timeout=60), Cache.shard

    def waiting(self, number, fields=None):
        if number < 2:
            both.wait()  # until the other is asked for too
        return read(self, number, fields)

    monkeypatch.setattr(Cache, "shard", waiting)
    found = [n for shard in cache.loss_masks() for n, _ in shard]
    assert found == list(range(DOCUMENTS))


class Stream(IterableDataset):
    """How a DataLoader's workers share a rank's part of an epoch."""

    def __init__(self, cache: Cache, rank: int, world: int) -> None:
        self.cache, self.rank, self.world = cache, rank, world

    def __iter__(self):
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        options = {"rank": self.rank * workers + worker, "world": self.world * workers}
        return (d.index for d in self.cache.documents(shuffle=True, seed=5, epoch=1, **options))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this machine has cores
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_dataloader_workers_cover_the_epoch_once(cache, world, workers):
    list(cache.documents(rank=0, world=8))  # zarrs has started its threads here: forked workers must read all the same
    seen = []
    for rank in range(world):
        seen += list(
            DataLoader(Stream(cache, rank, world), batch_size=None, num_workers=workers, timeout=60 * bool(workers))
        )
    assert sorted(seen) == list(range(DOCUMENTS))
