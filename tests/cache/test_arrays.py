"""Decoding what the builder lays out gives what Zarr gives, and any other layout is left to Zarr."""

from pathlib import Path

import numpy as np
import pytest
import zarr

import specauf.cache.shard
from cache_builder.encode import encode_group
from specauf.cache import open_cache
from specauf.cache.arrays import decode_object, read_array
from specauf.cache.location import Location, crc32c
from tests.cache.test_golden import CACHES, GOLDEN, numbers


@pytest.mark.parametrize("name", CACHES)
def test_direct_decoding_equals_zarr(name: str) -> None:
    groups = sorted((GOLDEN / name).glob("shard-*.zarr"))
    assert len(groups) == 2
    for group in groups:
        for field in sorted(p.parent.name for p in group.glob("*/zarr.json")):
            (chunk,) = (p for p in (group / field / "c").rglob("*") if p.is_file())
            found = decode_object((group / field / "zarr.json").read_bytes(), chunk.read_bytes())
            expected = read_array(group, field)
            assert found is not None
            assert found.dtype == expected.dtype
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", ["int8", "bf16"])
def test_reading_through_zarr_alone_gives_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    direct = numbers(GOLDEN / name)
    monkeypatch.setattr(specauf.cache.shard, "decode_object", lambda metadata, data: None)
    through_zarr = numbers(GOLDEN / name)
    assert direct.keys() == through_zarr.keys()
    for key, value in direct.items():
        np.testing.assert_array_equal(value, through_zarr[key])
    assert len(open_cache(str(GOLDEN / name))) == 5


@pytest.mark.parametrize(
    "options",
    [
        {"chunks": (10,), "compressors": None},
        {"chunks": (4,), "shards": (12,), "compressors": [zarr.codecs.GzipCodec()]},
        {"chunks": (4,), "shards": (8,)},
    ],
    ids=["no shard", "gzip", "several shards"],
)
def test_other_layouts_are_left_to_zarr(tmp_path: Path, options: dict) -> None:
    array = zarr.create_array(tmp_path / "a", shape=(10,), dtype="uint16", zarr_format=3, **options)
    array[...] = np.arange(10)
    (chunk, *_) = sorted(p for p in (tmp_path / "a" / "c").rglob("*") if p.is_file())
    assert decode_object((tmp_path / "a" / "zarr.json").read_bytes(), chunk.read_bytes()) is None
    np.testing.assert_array_equal(read_array(tmp_path, "a"), np.arange(10))


@pytest.mark.parametrize("compress_features", [False, True])
def test_large_arrays_of_many_chunks(tmp_path: Path, compress_features: bool) -> None:
    """More than a chunk, and enough that the object is mapped and that threads share the work."""
    rng = np.random.default_rng(0)
    written = {"sketch": rng.integers(-9, 9, (9001, 700), np.int8), "tokens": rng.integers(0, 9, 999_999, np.uint16)}
    place = Location(str(tmp_path / "group"))
    for name, data in encode_group(written, {}, compress_features=compress_features).items():
        place.write(name, data)
    stored = place.read_views(list(place.files()))
    whole = stored["sketch/c/0/0"]
    assert len(whole) == place.files()["sketch/c/0/0"]
    assert isinstance(whole, memoryview) == (not compress_features), "6 MB are mapped, 3 MB are read"
    before = crc32c(bytes(whole))
    assert crc32c(whole) == before
    for name, array in written.items():
        (chunk,) = (n for n in stored if n.startswith(f"{name}/c/"))
        found = decode_object(stored[f"{name}/zarr.json"], stored[chunk])
        assert found is not None
        np.testing.assert_array_equal(found, array)
        np.testing.assert_array_equal(read_array(tmp_path / "group", name), array)
    place.write("sketch/c/0/0", b"another file in its place")
    assert crc32c(whole) == before, "what is mapped stays as it was"
