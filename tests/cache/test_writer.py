"""Writing: same bytes from anyone, resuming, replacing, and mistakes that end in one line."""

import errno
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cache_builder import manifest
from cache_builder.features import fit_features
from cache_builder.sparse import keep_mass
from cache_builder.writer import StorageSpec, begin, committed_shards, write_manifest, write_shard
from specauf.cache import logprobs, open_cache, verify
from specauf.cache.location import Location
from specauf.errors import UserError
from tests.cache.making import build, document, expect_fields_of_the_arrays, identity, write_fake_target

PLAIN = identity(features="none")
SPEC = StorageSpec(PLAIN, fit_features(torch.zeros(1, 16), "none", 2))


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("features", ["none", "bf16", "int8", "sketch"])
def test_the_same_documents_give_the_same_bytes(tmp_path, features):
    who = identity(features=features, sketch_rank=8 * (features == "sketch"))
    for name in ("a", "b"):
        build(tmp_path / name, who, [[9, 30], [500, 3, 20]])
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_shards_may_come_in_any_order_and_twice(tmp_path):
    rng = np.random.default_rng(0)
    shards = [[document(rng, n, PLAIN)] for n in (9, 12, 5)]
    for folder, order in ((tmp_path / "a", (0, 1, 2)), (tmp_path / "b", (2, 0, 0, 1, 2))):
        begin(str(folder), PLAIN)
        write_fake_target(folder, PLAIN, SPEC.codec)
        for number in order:
            write_shard(str(folder), number, shards[number], SPEC)
        write_manifest(str(folder), PLAIN, 3)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_what_a_killed_writer_left_is_replaced(tmp_path):
    folder = tmp_path / "cache"
    build(folder, PLAIN, [[9, 4], [7, 7]])
    whole = contents(folder)
    (folder / "shard-00001.json").unlink()
    (folder / "manifest.json").unlink()
    (folder / "shard-00001.zarr" / "tokens" / "c" / "0").write_bytes(b"half")
    (folder / "shard-00001.zarr" / "tokens" / "c" / "0.specauf-tmp-123").write_bytes(b"half of it")
    (folder / "shard-00001.zarr" / "old").mkdir()
    (folder / "shard-00001.zarr" / "old" / "zarr.json").write_bytes(b"{}")
    assert list(committed_shards(str(folder), PLAIN)) == [0]
    with pytest.raises(UserError, match="unfinished"):
        open_cache(str(folder))
    rng = np.random.default_rng(0)
    documents = [
        [document(rng, n, PLAIN, held_out=i % 5 == 4) for i, n in enumerate(shard)] for shard in ([9, 4], [7, 7])
    ]
    write_shard(str(folder), 1, documents[1], SPEC, {"empty": 1})
    write_manifest(str(folder), PLAIN, 2, {"too short": 2})
    assert contents(folder) == whole


def test_a_missing_shard_stops_the_manifest(tmp_path):
    begin(str(tmp_path / "c"), PLAIN)
    write_fake_target(tmp_path / "c", PLAIN, SPEC.codec)
    for number, missing in ((1, 0), (0, 2)):
        write_shard(str(tmp_path / "c"), number, [document(np.random.default_rng(0), 5, PLAIN)], SPEC)
        # The last one, too: only the plan knows how many there are.
        with pytest.raises(UserError, match=f"shard-0000{missing} is missing"):
            write_manifest(str(tmp_path / "c"), PLAIN, 3)


def test_shards_of_which_nothing_is_left_count_their_drops_and_are_not_read(tmp_path):
    folder = tmp_path / "c"
    begin(str(folder), PLAIN)
    write_fake_target(folder, PLAIN, SPEC.codec)
    for number in (0, 2, 3):
        write_shard(str(folder), number, [], SPEC, {"over_long": 2})
    write_shard(str(folder), 1, [], SPEC)
    with pytest.raises(UserError, match=r"no document is left to store \(6 over_long\)"):
        write_manifest(str(folder), PLAIN, 4)
    documents = [document(np.random.default_rng(0), n, PLAIN) for n in (5, 8)]
    write_shard(str(folder), 1, documents, SPEC)
    manifest = write_manifest(str(folder), PLAIN, 4)
    assert manifest.drops == {"over_long": 6}
    assert [s.counts.documents for s in manifest.shards] == [0, 2, 0, 0]
    cache = open_cache(str(folder))
    assert (len(cache), cache.num_shards) == (2, 1)
    for shuffle in (False, True):
        assert sorted(len(d.tokens) for d in cache.documents(shuffle=shuffle)) == [5, 8]
    assert len(cache.document(1).tokens) == 8
    assert verify(cache) == []
    (folder / "shard-00002.zarr").mkdir()
    (folder / "shard-00002.zarr/stray").write_text("x")
    (folder / "shard-00003.json").unlink()
    assert [p.shard for p in verify(cache)] == ["shard-00002", "shard-00003"]


CHANGES = {
    "target": {"id": "tiny/other", "fingerprint": "00ff"},
    "tokenizer_hash": "ab",
    "chat_template_hash": "cc",
    "vocab_size": 301,
    "taps": (0, 1),
    "k": 5,
    "features": "bf16",
    "corpus": {"name": "another"},
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("finished", [True, False])
def test_another_identity_is_refused_with_both_values(tmp_path, name, finished):
    folder = str(tmp_path / "cache")
    if finished:
        build(folder, PLAIN, [[9]])
    else:
        begin(folder, PLAIN)
        write_fake_target(folder, PLAIN, SPEC.codec)
    other = replace(PLAIN, **{name: CHANGES[name]})
    with pytest.raises(UserError) as caught:
        begin(folder, other)
    for value in (getattr(PLAIN, name), CHANGES[name]):
        entry = {"target": "id", "corpus": "name"}.get(name)
        assert repr(value[entry] if entry else value) in str(caught.value)
    assert name in str(caught.value)
    begin(folder, PLAIN)


def test_where_nothing_is_stored_yet_another_identity_takes_its_place(tmp_path):
    begin(str(tmp_path), PLAIN)
    begin(str(tmp_path), replace(PLAIN, k=5))
    write_fake_target(tmp_path, replace(PLAIN, k=5), SPEC.codec)
    with pytest.raises(UserError, match="k is 5, this build has"):
        begin(str(tmp_path), PLAIN)


def test_reading_can_require_an_identity(tmp_path):
    build(tmp_path / "c", PLAIN, [[9]])
    found = open_cache(str(tmp_path / "c")).manifest.identity
    found.require("c", vocab_size=300, taps=(0, 2))
    with pytest.raises(UserError, match=r"tokenizer_hash is 'aa', expected 'zz'"):
        found.require("c", vocab_size=300, tokenizer_hash="zz")


def test_a_place_that_is_taken(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file, expected a directory"):
        begin(str(tmp_path / "file"), PLAIN)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"holds 'thesis.tex' and no cache"):
        begin(str(tmp_path / "home"), PLAIN)


def test_a_full_disk_ends_in_one_line_and_leaves_no_commit(tmp_path, monkeypatch):
    folder = tmp_path / "c"
    begin(str(folder), PLAIN)
    write_fake_target(folder, PLAIN, SPEC.codec)
    documents = [document(np.random.default_rng(0), 30, PLAIN)]
    written = 0

    def full(descriptor: int) -> None:
        nonlocal written
        written += 1
        if written > 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"cannot write .*No space left on device; make room") as caught:
            write_shard(str(folder), 0, documents, SPEC)
    assert "\n" not in str(caught.value)
    assert committed_shards(str(folder), PLAIN) == {}
    assert not list(folder.rglob("*-tmp-*"))
    write_shard(str(folder), 0, documents, SPEC)
    write_manifest(str(folder), PLAIN, 1)
    assert verify(open_cache(str(folder))) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tokens": np.full(10, 300)}, "tokens hold ids from 300 to 300, the vocabulary has 300"),
        ({"tokens": np.full(10, -1)}, "tokens hold ids from -1"),
        ({"topk_ids": np.full((5, 4), 300)}, "topk_ids hold ids"),
        ({"topk_logprobs": np.full((5, 4), np.nan, np.float32)}, "NaN or Inf"),
        ({"topk_logprobs": np.log(np.full((5, 4), (0.3, 0.1, 0.2, 0.1), np.float32))}, "does not fall"),
        ({"row_index": np.arange(5)}, "row_index: has a row whose next token is not supervised"),
        ({"topk_ids": np.zeros((5, 3), int), "topk_logprobs": np.zeros((5, 3), np.float32)}, "topk_ids: shape"),
    ],
)
def test_documents_that_break_a_rule(tmp_path, change, says):
    good = document(np.random.default_rng(0), 10, PLAIN)
    with pytest.raises(UserError, match=says):
        write_shard(str(tmp_path / "c"), 0, [replace(good, **change)], SPEC)


def test_missing_features_are_refused(tmp_path):
    who = identity()
    documents = [replace(document(np.random.default_rng(0), 10, who), features=None)]
    with pytest.raises(UserError, match="features are bf16, but 1 documents have none"):
        write_shard(str(tmp_path / "c"), 0, documents, StorageSpec(who, fit_features(torch.zeros(1, 16), "bf16", 2)))


def test_rows_cut_at_a_mass(tmp_path):
    who = identity(features="none", top_p=0.6)
    exact = document(np.random.default_rng(0), 60, who)
    cut = keep_mass(torch.from_numpy(exact.topk_logprobs), 0.6).numpy()
    spec = StorageSpec(who, SPEC.codec)
    begin(str(tmp_path / "c"), who)
    write_fake_target(tmp_path / "c", who, spec.codec)
    write_shard(str(tmp_path / "c"), 0, [replace(exact, topk_logprobs=cut)], spec)
    write_manifest(str(tmp_path / "c"), who, 1)
    (found,) = open_cache(str(tmp_path / "c")).documents()
    assert np.isneginf(cut).any()
    np.testing.assert_array_equal(np.isneginf(found.topk_logprobs), np.isneginf(cut))
    np.testing.assert_array_equal(found.topk_ids, np.where(np.isneginf(cut), -1, exact.topk_ids))
    np.testing.assert_allclose(found.head_mass, np.exp(cut).sum(1), atol=1e-3)


def test_ranks_are_as_wide_as_the_longest_table_asks(tmp_path, monkeypatch):
    """A table of more than 65,536 ids takes 4 bytes a rank, and only the shards that have one."""
    monkeypatch.setattr(logprobs, "smallest_uint", lambda n: np.dtype(np.uint16 if n < 12 else np.uint32))
    monkeypatch.setattr(manifest, "smallest_uint", logprobs.smallest_uint)
    for name, lengths in (("both", [[3], [40]]), ("narrow", [[3], [3]])):
        build(tmp_path / name, PLAIN, lengths)
        expect_fields_of_the_arrays(tmp_path / name, open_cache(str(tmp_path / name)).manifest)
    assert open_cache(str(tmp_path / "narrow")).manifest.fields["topk_ids"].dtype == "uint16"
    assert open_cache(str(tmp_path / "both")).manifest.fields["topk_ids"].dtype == "uint32"


def test_finishing_and_going_on_make_as_many_requests_for_many_shards_as_for_few(tmp_path, monkeypatch):
    asked: list[str] = []

    def counted(name):
        really = getattr(Location, name)

        def request(self, *rest):
            asked.append(name)
            return really(self, *rest)

        monkeypatch.setattr(Location, name, request)

    for shards in (2, 9):
        build(tmp_path / str(shards), PLAIN, [[5]] * shards)
    for name in ("read", "read_all", "files", "write"):
        counted(name)
    counts = []
    for shards in (2, 9):
        asked.clear()
        assert len(committed_shards(str(tmp_path / str(shards)), PLAIN)) == shards
        write_manifest(str(tmp_path / str(shards)), PLAIN, shards)
        counts.append(sorted(asked))
    assert counts[0] == counts[1]
    assert len(counts[0]) < 10


@pytest.mark.parametrize(("harm", "says"), [(Path.unlink, "missing"), (lambda p: p.write_bytes(b"{}"), "damaged")])
def test_a_table_that_cannot_be_counted_stops_the_manifest(tmp_path, harm, says):
    build(tmp_path / "c", PLAIN, [[9, 4], [7]])
    harm(tmp_path / "c/shard-00001.zarr/id_table/zarr.json")
    with pytest.raises(UserError, match=rf"shard-00001.zarr/id_table/zarr.json is {says}: delete shard-00001.json and"):
        write_manifest(str(tmp_path / "c"), PLAIN, 2)


@given(
    lengths=st.lists(st.lists(st.integers(1, 70), min_size=1, max_size=6), min_size=1, max_size=3),
    k=st.integers(1, 40),
    vocabulary=st.sampled_from([40, 300, 66_000]),
    features=st.sampled_from(["none", "bf16", "int8", "sketch"]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_shape_comes_back(tmp_path_factory, lengths, k, vocabulary, features, seed):
    folder = tmp_path_factory.mktemp("any") / "c"
    who = identity(k=k, vocab_size=vocabulary, features=features, sketch_rank=5 * (features == "sketch"))
    written = build(folder, who, lengths, seed)
    cache = open_cache(str(folder))
    assert verify(cache) == []
    expect_fields_of_the_arrays(folder, cache.manifest)
    counts = cache.manifest.counts
    assert counts.tokens == sum(len(d.tokens) for d in written)
    assert counts.rows == sum(len(d.row_index) for d in written)
    assert counts.argmax_is_data_sum == sum(int((d.topk_ids[:, 0] == d.tokens[d.row_index + 1]).sum()) for d in written)
    for found, exact in zip(cache.documents(), written, strict=True):
        np.testing.assert_array_equal(found.tokens, exact.tokens)
        np.testing.assert_array_equal(found.loss_mask, exact.loss_mask)
        np.testing.assert_array_equal(found.row_index, exact.row_index)
        np.testing.assert_array_equal(found.topk_ids, exact.topk_ids)
        np.testing.assert_allclose(found.topk_logprobs, exact.topk_logprobs, atol=0.07)
        assert (found.features is None) == (features == "none")
    stored = sum(f.bytes for f in cache.manifest.fields.values())
    assert 0 < cache.manifest.total_bytes - stored < 1000 * len(lengths), "all but each group's own metadata"
