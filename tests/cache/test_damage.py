"""Whatever happens to any object of a cache, `verify` and reading both name the shard and the field."""

import json
import shutil
from pathlib import Path

import pytest

from specauf.cache import Cache, open_cache, verify
from specauf.cache.schema import seal
from specauf.errors import UserError
from tests.cache.making import build, identity

SKETCH = identity(features="sketch", sketch_rank=8)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("damage") / "cache"
    build(folder, SKETCH, [[9, 3, 17], [12, 40, 6]])
    return folder


def kinds(folder: Path) -> list[str]:
    """One object of every kind; of the two shards, the second's."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return [n for n in names if not n.startswith("shard-00000")]


OBJECTS = [
    "build.json",
    "identity.json",
    "manifest.json",
    "target.json",
    "target/config.json",
    "target/features.safetensors",
    "target/weights.safetensors",
    "target/tokenizer/tokenizer.json",
    "target/tokenizer/chat_template.jinja",
    "shard-00001.json",
    "shard-00001.zarr/zarr.json",
    *(
        f"shard-00001.zarr/{field}/{part}"
        for field, dimensions in {
            "tokens": 1,
            "loss_mask": 1,
            "doc_offsets": 1,
            "held_out": 1,
            "row_index": 1,
            "topk_ids": 2,
            "id_table": 1,
            "topk_logprobs": 2,
            "head_mass": 1,
            "sketch": 2,
            "feature_scale": 1,
        }.items()
        for part in ("zarr.json", "c" + "/0" * dimensions)
    ),
]


def test_the_list_of_kinds_is_complete(pristine):
    assert kinds(pristine) == sorted(OBJECTS)


@pytest.fixture
def copy(pristine, tmp_path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "cache"))


def named(name: str) -> tuple[str, str]:
    """Shard and field that a message about an object must name."""
    top, _, rest = name.partition("/")
    if top.endswith(".zarr"):
        return top[:-5], "group" if rest == "zarr.json" else rest.split("/")[0]
    if top in ("build.json", "identity.json"):
        return "", top
    if top == "target":
        return top, rest.split("/")[0]
    return top.removesuffix(".json"), "commit record"


def read_everything(folder: Path) -> None:
    cache = open_cache(str(folder))
    for document in cache.documents():
        assert document.features is not None
    assert cache.target.embed_tokens is not None
    assert cache.target.config
    assert cache.target.tokenizer_directory.is_dir()


def expect_named(folder: Path, name: str) -> None:
    shard, field = named(name)
    if name == "manifest.json":
        with pytest.raises(UserError, match=r"manifest\.json"):
            open_cache(str(folder))
        return
    problems = verify(open_cache(str(folder)))
    assert {p.shard for p in problems} == {shard}
    assert field in {p.field for p in problems}
    assert all(shard in str(p) for p in problems)
    assert any(field in str(p) for p in problems)
    if name not in ("build.json", "identity.json"):  # nothing reads these but a repair
        with pytest.raises(UserError) as caught:
            read_everything(folder)
        assert shard in str(caught.value)
        assert field in str(caught.value)
        assert "\n" not in str(caught.value)


def test_an_untouched_cache_has_no_problem(pristine):
    assert verify(open_cache(str(pristine))) == []
    read_everything(pristine)


@pytest.mark.parametrize("name", OBJECTS)
def test_one_flipped_bit(copy, name):
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 0x10
    (copy / name).write_bytes(data)
    expect_named(copy, name)


@pytest.mark.parametrize("name", OBJECTS)
def test_truncated(copy, name):
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data[:-1])
    expect_named(copy, name)


@pytest.mark.parametrize("name", OBJECTS)
def test_missing(copy, name):
    (copy / name).unlink()
    expect_named(copy, name)


@pytest.mark.parametrize(
    "name", ["shard-00001.zarr/tokens/c/1", "shard-00001.zarr/extra/zarr.json", "target/model.bin"]
)
def test_extra_object(copy, name):
    (copy / name).parent.mkdir(parents=True, exist_ok=True)
    (copy / name).write_bytes(b"{}")
    expect_named(copy, name)


@pytest.mark.parametrize("name", ["shard-00002.json", "shard-00002.zarr/zarr.json", "notes.txt"])
def test_extra_object_beside_the_shards(copy, name):
    (copy / name).parent.mkdir(parents=True, exist_ok=True)
    (copy / name).write_bytes(b"{}")
    problems = verify(open_cache(str(copy)))
    assert [p.what for p in problems] == [f"{name} is not in manifest.json: delete it"]


def test_every_bit_of_the_manifest_counts(copy):
    data = (copy / "manifest.json").read_bytes()
    for place in range(0, len(data), 7):
        broken = bytearray(data)
        broken[place] ^= 1 << (place % 8)
        (copy / "manifest.json").write_bytes(broken)
        with pytest.raises(UserError, match=r"manifest\.json"):
            open_cache(str(copy))


def test_all_bad_shards_are_listed(copy):
    for name in ("shard-00000.zarr/tokens/c/0", "shard-00000.zarr/head_mass/c/0", "shard-00001.zarr/sketch/c/0/0"):
        data = bytearray((copy / name).read_bytes())
        data[0] ^= 1
        (copy / name).write_bytes(data)
    problems = verify(open_cache(str(copy)))
    assert [(p.shard, p.field) for p in problems] == [
        ("shard-00000", "head_mass"),
        ("shard-00000", "tokens"),
        ("shard-00001", "sketch"),
    ]


def test_shards_that_changed_places_are_found(copy):
    """Each object's own checksum would be right; the digests in the records are not."""
    a, b = copy / "shard-00000.zarr", copy / "shard-00001.zarr"
    a.rename(copy / "third")
    b.rename(a)
    (copy / "third").rename(b)
    assert {p.shard for p in verify(open_cache(str(copy)))} == {"shard-00000", "shard-00001"}


def resealed(cache: Cache, edit) -> bytes:
    manifest = json.loads(seal(cache.manifest))
    edit(manifest)
    manifest["checksum"] = ""
    from specauf.cache.location import sha256

    blank = (json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()
    manifest["checksum"] = sha256(blank)
    return (json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


@pytest.mark.parametrize("name", ["../outside", "/etc", "..", "a/b", "shard-0\n", "", "C:\\x"])
@pytest.mark.parametrize("kind", ["shard", "note"])
def test_a_manifest_cannot_point_outside(copy, name, kind):
    def edit(manifest):
        if kind == "shard":
            manifest["shards"][0]["name"] = name
        else:
            manifest["notes"] = {name: manifest["notes"]["build.json"]}

    (copy / "manifest.json").write_bytes(resealed(open_cache(str(copy)), edit))
    with pytest.raises(UserError, match="leaves the cache"):
        open_cache(str(copy))


@pytest.mark.parametrize("name", ["../../outside", "tokens/../../x", "/etc/passwd", "tokens//c", "./x"])
def test_a_commit_record_cannot_point_outside(copy, name):
    from specauf.cache.location import sha256

    record = json.loads((copy / "shard-00001.json").read_bytes())
    record["objects"][name] = {"bytes": 1, "sha256": "0" * 64}
    data = json.dumps(record).encode()
    (copy / "shard-00001.json").write_bytes(data)

    def edit(manifest):
        manifest["shards"][1]["record"] = sha256(data)

    (copy / "manifest.json").write_bytes(resealed(open_cache(str(copy)), edit))
    with pytest.raises(UserError, match="leaves the shard"):
        read_everything(copy)


def test_a_newer_format_is_refused(copy):
    def edit(manifest):
        manifest["format"] = 2

    (copy / "manifest.json").write_bytes(resealed(open_cache(str(copy)), edit))
    with pytest.raises(UserError, match=r"format is 2, this version reads 1: upgrade"):
        open_cache(str(copy))


def test_counts_that_the_manifest_gets_wrong(copy):
    def edit(manifest):
        manifest["shards"][0]["counts"]["supervised_tokens"] += 1

    (copy / "manifest.json").write_bytes(resealed(open_cache(str(copy)), edit))
    assert [(p.shard, p.field) for p in verify(open_cache(str(copy)))] == [("shard-00000", "supervised_tokens")]


@pytest.mark.parametrize(
    ("place", "says"),
    [("nowhere", "does not exist"), ("file", "is a file"), ("empty", "holds no manifest"), ("cache", "unfinished")],
)
def test_what_is_no_cache(copy, tmp_path, place, says):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    (copy / "manifest.json").unlink()
    with pytest.raises(UserError, match=says):
        open_cache(str(tmp_path / place))
