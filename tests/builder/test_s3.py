"""Building, resuming, checking and reading through a real S3 server on this machine."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cache_builder.driver import build
from cache_builder.repair import check, repair
from specauf.cache import open_cache, verify
from specauf.cache.location import Location, sha256
from specauf.errors import UserError
from tests.builder.conftest import digests, write_jsonl
from tests.builder.test_build import config

pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 'specauf[s3,dev]'")
moto = pytest.importorskip("moto.server", reason="moto is not installed: pip install 'specauf[s3,dev]'")
pytestmark = [
    pytest.mark.slow,
    # The S3 client's own habits: deprecated dates, connections that are closed when collected.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """URL of an empty bucket; the server's address and keys come from the environment, as a user would give them."""
    import s3fs

    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    name = "bucket-" + sha256(str(tmp_path).encode())[:12]  # servers of one process share what they hold
    s3fs.S3FileSystem().mkdir(name)
    yield f"s3://{name}"
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def remote_digests(url: str) -> dict[str, str]:
    place = Location(url)
    return {name: sha256(place.read(name)) for name in place.files()}


@pytest.mark.parametrize("features", ["bf16", "sketch"])
def test_a_cache_on_s3_is_the_cache_on_disk(tiny_target_dir: Path, tmp_path: Path, bucket: str, features: str) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [{"prompt": f"question number {i}"} for i in range(40)])
    url = f"{bucket}/caches/tiny"
    changes = {"features": features, "sketch_rank": 16}
    build(config(tiny_target_dir, corpus, tmp_path / "cache", **changes))
    here = config(tiny_target_dir, corpus, Path("unused"), **changes)
    here = type(here)(**{**here.__dict__, "out": url})
    build(here)
    assert remote_digests(url) == digests(tmp_path / "cache")
    cache, local = open_cache(url), open_cache(str(tmp_path / "cache"))
    assert verify(cache) == []
    assert cache.target.tokenizer_directory.is_dir()
    order = {"shuffle": True, "seed": 3, "epoch": 1}
    for rank in range(2):
        pair = (opened.documents(rank=rank, world=2, **order) for opened in (cache, local))
        for far, near in zip(*pair, strict=True):
            assert far.index == near.index
            assert (far.tokens == near.tokens).all()
            assert (far.topk_logprobs == near.topk_logprobs).all()
            assert (far.training_features == near.training_features).all()


def test_damage_on_s3_is_named_and_repaired(tiny_target_dir: Path, tmp_path: Path, bucket: str) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [{"prompt": f"question number {i}"} for i in range(40)])
    here = config(tiny_target_dir, corpus, Path("unused"))
    here = type(here)(**{**here.__dict__, "out": f"{bucket}/tiny"})
    build(here)
    place, whole = Location(here.out), remote_digests(here.out)
    for name, data in (
        ("shard-00001.zarr/tokens/c/0", None),
        ("shard-00002.zarr/head_mass/c/0", place.read("shard-00002.zarr/head_mass/c/0")[:-1]),
        ("shard-00000.zarr/extra", b"x"),
    ):
        if data is None:
            place.remove(name)
        else:
            place.write(name, data)
    found = [(p.shard, p.field) for p in check(here.out).problems]
    assert found == [("shard-00000", "extra"), ("shard-00001", "tokens"), ("shard-00002", "head_mass")]
    with pytest.raises(UserError, match=r"shard-00001: field tokens: object tokens/c/0 is missing"):
        open_cache(here.out).shard(1)
    assert repair(here.out, "cpu").problems == []
    assert remote_digests(here.out) == whole
    place.remove("manifest.json")
    place.remove("shard-00001.json")
    with pytest.raises(UserError, match="unfinished"):
        open_cache(here.out)
    build(here)
    assert remote_digests(here.out) == whole


def test_a_bucket_that_is_not_there_is_one_line(bucket: str) -> None:
    with pytest.raises(UserError, match="does not exist") as caught:
        open_cache("s3://elsewhere/cache")
    assert "\n" not in str(caught.value)
