"""Shards are written in order, here or in a thread of their own, and what goes wrong there is not lost."""

import threading
from types import SimpleNamespace

import pytest
import torch

import cache_builder.driver
from cache_builder.driver import build
from cache_builder.shard_writer import ShardWriter
from cache_builder.target import Target
from specauf.errors import UserError
from tests.builder.conftest import digests, write_jsonl
from tests.builder.test_build import config


@pytest.mark.parametrize("beside", [False, True])
def test_shards_come_in_order_and_all_are_written_at_the_end(beside):
    written, threads = [], set()

    def write(number: int, what: str) -> None:
        written.append((number, what))
        threads.add(threading.get_ident())

    with ShardWriter(write, beside=beside) as writer:
        for number in range(5):
            writer(number, "x" * number)
    assert written == [(n, "x" * n) for n in range(5)]
    assert (threading.get_ident() in threads) is not beside


def test_the_next_shard_is_made_while_one_is_written():
    written, go = [], threading.Event()

    def write(number: int) -> None:
        assert go.wait(60)
        written.append(number)

    with ShardWriter(write, beside=True) as writer:
        writer(0)
        assert written == []  # and here the target would be at work on shard 1
        go.set()
        writer(1)
        assert 0 in written


@pytest.mark.parametrize("beside", [False, True])
def test_an_error_comes_with_the_next_shard_or_at_the_end(beside):
    def write(number: int) -> None:
        if number == 1:
            raise UserError("the disk is full")

    made: list[int] = []

    def work(last: int) -> None:
        with ShardWriter(write, beside=beside) as writer:
            for number in range(last + 1):
                made.append(number)
                writer(number)

    for last in (1, 2):
        made.clear()
        with pytest.raises(UserError, match="the disk is full"):
            work(last)
        assert made[-1] == (last if beside else 1)


def test_what_ends_the_work_is_not_hidden_by_what_was_being_written():
    def write(number: int) -> None:
        raise UserError("the disk is full")

    def work() -> None:
        with ShardWriter(write, beside=True) as writer:
            writer(0)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()


def beside_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_builder.driver, "ShardWriter", lambda write, beside: ShardWriter(write, beside=True))


def questions(folder) -> object:
    return write_jsonl(
        folder / "questions.jsonl", [{"messages": [{"role": "user", "content": f"question {n}"}]} for n in range(24)]
    )


def test_a_build_that_writes_beside_gives_the_same_cache(tiny_target_dir, tmp_path, monkeypatch):
    corpus = questions(tmp_path)
    here, beside = (
        config(tiny_target_dir, corpus, tmp_path / name, documents_per_shard=4) for name in ("here", "beside")
    )
    build(here)
    beside_everywhere(monkeypatch)
    build(beside)
    assert digests(tmp_path / "beside") == digests(tmp_path / "here")


def test_a_full_disk_ends_a_build_that_writes_beside_and_it_goes_on_later(tiny_target_dir, tmp_path, monkeypatch):
    corpus = questions(tmp_path)
    whole, cut = (config(tiny_target_dir, corpus, tmp_path / name, documents_per_shard=4) for name in ("whole", "cut"))
    build(whole)
    beside_everywhere(monkeypatch)
    really = cache_builder.builder.write_shard

    def full(folder, number, *rest):
        if number == 2:
            raise UserError("no space left")
        return really(folder, number, *rest)

    monkeypatch.setattr(cache_builder.builder, "write_shard", full)
    with pytest.raises(UserError, match="no space left"):
        build(cut)
    assert (tmp_path / "cut" / "shard-00001.json").exists()
    assert not (tmp_path / "cut" / "manifest.json").exists()
    monkeypatch.setattr(cache_builder.builder, "write_shard", really)
    build(cut)
    assert digests(tmp_path / "cut") == digests(tmp_path / "whole")


@pytest.mark.parametrize(("free", "cached", "place"), [(1279, 0, "cpu"), (1280, 0, "cuda:1"), (1240, 40, "cuda:1")])
def test_features_stay_on_a_gpu_while_they_take_an_eighth_of_what_is_free(free, cached, place, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**6))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: cached + 7)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 7)
    target = SimpleNamespace(device=torch.device("cuda", 1), taps=(1, 2), hidden_size=8)
    assert Target.place_for_features(target, 5) == torch.device(place)  # 5 tokens of 16 numbers of 2 bytes
