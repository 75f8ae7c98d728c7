import argparse

import numpy as np
import pytest

from benchmarks.scale import documents_of, exponents, read_part, write_cache
from benchmarks.scale_plot import draw, series
from specauf.cache import open_cache


@pytest.fixture(scope="module")
def args() -> argparse.Namespace:
    return argparse.Namespace(hidden=8, vocab=500, k=[2, 4])


def test_a_shard_written_over_and_over_is_a_sound_cache_read_once_per_rank(args, tmp_path):
    row = write_cache(tmp_path / "c", args, k=4, shards=3)
    cache = open_cache(str(tmp_path / "c"))
    assert cache.num_shards == 3
    assert row["tokens"] == 3 * sum(len(d.tokens) for d in documents_of(args, 4))
    total = cache.manifest.total_bytes  # of the arrays, without records
    assert total < row["bytes"] < 1.1 * total
    parts = [read_part(cache.url, rank, 2, passes=1) for rank in range(2)]
    assert all(p["read_seconds"] > 0 for p in parts)
    # Both ranks draw the same order, so their last passes share no document and leave none out.
    assert sum(p["read_tokens"] for p in parts) == row["tokens"]


def test_documents_differ_by_the_cut_alone(args):
    for few, many in zip(documents_of(args, 2), documents_of(args, 4), strict=True):
        assert np.array_equal(few.tokens, many.tokens)
        assert np.array_equal(few.topk_ids, many.topk_ids[:, :2])


def test_exponents_leave_out_what_is_zero_or_has_one_size():
    found = {
        "k": [(8, {"bytes": 80.0, "reader_mib": 0.0}), (16, {"bytes": 160.0, "reader_mib": 1.0})],
        "corpus": [(5, {"bytes": 1.0})],
    }
    assert exponents(found) == {"k": {"bytes": pytest.approx(1.0)}}


def test_the_plot_is_written(tmp_path):
    found = {
        "corpus": [(10, {"bytes": 2e6, "read_seconds": 1.0}), (100, {"bytes": 2e7, "read_seconds": 9.0})],
        "ranks": [(1, {"read_seconds": 9.0}), (2, {"read_seconds": 5.0})],
    }
    assert series(found["corpus"])["size, MB"] == ([10, 100], [2.0, 20.0])
    draw(found, str(tmp_path / "p.png"))
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
