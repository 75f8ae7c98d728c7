"""The committed caches of format 1, which every later version must read to the same numbers, as must other programs."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr

from cache_builder.writer import begin, write_manifest
from specauf.cache import open_cache, verify
from specauf.errors import UserError
from tests.cache.making import build, expect_fields_of_the_arrays, identity

GOLDEN = Path(__file__).parent / "golden"
LENGTHS = [[9, 3, 17], [12, 6]]
CACHES = {
    "bf16": identity(features="bf16", top_p=0.9),
    "int8": identity(features="int8"),
    "sketch": identity(features="sketch", sketch_rank=4),
    "none": identity(features="none"),
    # Of the same version, after it got CRC-32C in its records and features that are not compressed.
    "sketch-plain": identity(features="sketch", sketch_rank=4),
    "bf16-plain": identity(features="bf16"),
    # After top-k went into planes of bits.
    "none-bits": identity(features="none"),
}


def numbers(folder: Path) -> dict[str, np.ndarray]:
    """Every number that reading gives, by document and field."""
    found = {}
    for d in open_cache(str(folder)).documents():
        for name in ("tokens", "loss_mask", "row_index", "topk_ids", "topk_logprobs", "head_mass", "training_features"):
            value = getattr(d, name)
            if value is not None:
                found[f"{d.index}/{name}"] = value
        found[f"{d.index}/held_out"] = np.array(d.held_out)
    return found


def make() -> None:
    """Write the caches that are not there yet, and what reading them gave.

    python -m tests.cache.test_golden
    """
    for name, who in CACHES.items():
        if (GOLDEN / name).exists():
            continue
        build(GOLDEN / name, who, LENGTHS)
        np.savez_compressed(GOLDEN / f"{name}.npz", **numbers(GOLDEN / name))


@pytest.mark.parametrize("name", CACHES)
def test_it_still_reads_to_the_same_numbers(name):
    assert verify(open_cache(str(GOLDEN / name))) == []
    found = numbers(GOLDEN / name)
    with np.load(GOLDEN / f"{name}.npz") as expected:
        assert set(expected.files) == set(found)
        for key in expected.files:
            assert found[key].dtype == expected[key].dtype
            np.testing.assert_allclose(found[key], expected[key], rtol=1e-6, atol=1e-6, err_msg=key)
    manifest = open_cache(str(GOLDEN / name)).manifest
    assert manifest.format == 1
    assert manifest.counts.documents == 5
    assert manifest.drops == {"too short": 2, "empty": 2}


@pytest.mark.parametrize("name", CACHES)
def test_its_shards_still_sum_up_to_a_manifest(name, tmp_path):
    folder = Path(shutil.copytree(GOLDEN / name, tmp_path / name))
    before = open_cache(str(folder)).manifest
    begin(str(folder), CACHES[name])
    after = write_manifest(str(folder), CACHES[name], 2, {"too short": 2})
    assert (after.counts, after.drops, after.shards) == (before.counts, before.drops, before.shards)
    assert (folder / "identity.json").read_bytes() == (GOLDEN / name / "identity.json").read_bytes()
    expect_fields_of_the_arrays(folder, after)
    assert verify(open_cache(str(folder))) == []


@pytest.mark.parametrize("name", ["sketch", "sketch-plain"])
def test_a_flipped_bit_is_found_with_and_without_a_crc(name, tmp_path):
    folder = Path(shutil.copytree(GOLDEN / name, tmp_path / name))
    entry = open_cache(str(folder)).record(open_cache(str(folder)).manifest.shards[1]).objects["sketch/c/0/0"]
    assert (entry.crc32c is None) == (name == "sketch")
    path = folder / "shard-00001.zarr/sketch/c/0/0"
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)
    checksum = "sha256" if name == "sketch" else "CRC-32C"
    with pytest.raises(UserError, match=f"shard-00001: field sketch: object sketch/c/0/0 is damaged: its {checksum}"):
        numbers(folder)


@pytest.mark.parametrize("name", CACHES)
def test_another_program_can_read_it(name):
    """With plain Zarr and the formulas of docs/cache-format.md alone."""
    folder = GOLDEN / name
    manifest = json.loads((folder / "manifest.json").read_text())
    expected = np.load(GOLDEN / f"{name}.npz")
    document = 0
    for shard in manifest["shards"]:
        group = zarr.open_group(folder / f"{shard['name']}.zarr", mode="r")
        a = {key: np.asarray(value[...]) for key, value in group.arrays()}
        steps = {key: dict(value.attrs) for key, value in group.arrays()}
        codes = np.cumsum(a["topk_logprobs"].astype(np.int64), axis=1) % 65536
        s, knee, step = (steps["topk_logprobs"][n] for n in ("sqrt_steps", "knee_code", "log_step"))
        with np.errstate(divide="ignore", invalid="ignore"):
            high = 2 * np.log(1 - codes / s)
        low = 2 * np.log(1 - knee / s) - (codes - knee) * step
        logp = np.where(codes <= knee, high, low)
        logp[codes == steps["topk_logprobs"]["no_entry"]] = -np.inf
        mass = 1 / (1 + np.exp(-a["head_mass"].astype(float) * steps["head_mass"]["step"]))
        logp += (np.log(mass) - np.log(np.exp(logp).sum(1)))[:, None]
        ids = np.where(np.isinf(logp), -1, a["id_table"].astype(np.int64)[a["topk_ids"]])
        for start, stop in zip(a["doc_offsets"][:-1], a["doc_offsets"][1:], strict=True):
            rows = (a["row_index"] >= start) & (a["row_index"] < stop)
            np.testing.assert_array_equal(expected[f"{document}/tokens"], a["tokens"][start:stop])
            np.testing.assert_array_equal(expected[f"{document}/row_index"], a["row_index"][rows] - start)
            np.testing.assert_array_equal(expected[f"{document}/topk_ids"], ids[rows])
            np.testing.assert_allclose(expected[f"{document}/topk_logprobs"], logp[rows], rtol=1e-5, atol=1e-5)
            if name.startswith("sketch"):
                y = a["sketch"][start:stop] * a["feature_scale"][start:stop, None]
                np.testing.assert_allclose(expected[f"{document}/training_features"], y, rtol=1e-6)
            document += 1
    assert document == manifest["counts"]["documents"] == 5


if __name__ == "__main__":
    make()
    sys.stdout.write(f"{sum(p.stat().st_size for p in GOLDEN.rglob('*') if p.is_file())} bytes\n")
