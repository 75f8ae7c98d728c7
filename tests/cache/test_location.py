"""A store that fails for a moment: one line that says so, and nothing of a whole cache is taken for missing."""

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from cache_builder.lock import BuildLock
from cache_builder.repair import repair
from cache_builder.writer import begin, write_manifest
from specauf.cache import open_cache, verify
from specauf.cache.location import Location, StoreError
from tests.cache.making import build, identity

SKETCH = identity(features="sketch", sketch_rank=8)


class Flaky(MemoryFileSystem):
    """A store that raises when it is asked for what `trouble` matches."""

    protocol = "flaky"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    trouble: ClassVar[Callable[[str], None]] = lambda path: None

    def cat_file(self, path: str, *args: Any, **kwargs: Any) -> bytes:
        Flaky.trouble(path)
        return super().cat_file(path, *args, **kwargs)

    def pipe_file(self, path: str, *args: Any, **kwargs: Any) -> Any:
        Flaky.trouble(path)
        return super().pipe_file(path, *args, **kwargs)

    def rm(self, path: str, *args: Any, **kwargs: Any) -> None:
        Flaky.trouble(path)
        super().rm(path, *args, **kwargs)

    def find(self, path: str, *args: Any, **kwargs: Any) -> Any:
        Flaky.trouble(path)
        return super().find(path, *args, **kwargs)


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Lets every request for a path that ends so fail from now on."""
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    monkeypatch.setattr("cache_builder.lock.time.sleep", lambda seconds: None)

    def start(end: str, error: type[Exception] = OSError) -> None:
        def trouble(path: str) -> None:
            if path.endswith(end):
                raise error("503\nSlow Down")

        Flaky.trouble = trouble  # type: ignore[assignment]

    yield start
    Flaky.trouble = lambda path: None
    Flaky.store.clear()


OPERATIONS: dict[str, tuple[str, Callable[[Location], object]]] = {
    "read": ("flaky://c/x cannot be read", lambda place: place.read("x")),
    "read_all": ("flaky://c/x cannot be read", lambda place: place.read_all(["a", "none", "x"])),
    "read_views": ("flaky://c/x cannot be read", lambda place: place.read_views(["x"])),
    "write": ("flaky://c/x cannot be written", lambda place: place.write("x", b"new")),
    "remove": ("flaky://c/x cannot be removed", lambda place: place.remove("x")),
    "files": ("flaky://c cannot be listed", lambda place: place.files()),
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("error", [OSError, RuntimeError])
def test_what_a_store_raises_is_one_line(fail: Callable[..., None], name: str, error: type[Exception]) -> None:
    place = Location("flaky://c")
    for file in ("a", "x"):
        place.write(file, b"old")
    assert place.read_all(["a", "none"]) == {"a": b"old"}
    says, work = OPERATIONS[name]
    fail("c" if name == "files" else "x", error)
    with pytest.raises(StoreError, match=f"^{says}: 503 Slow Down; check the address and credentials") as caught:
        work(place)
    assert "\n" not in str(caught.value)
    fail("nothing")
    assert place.read_all(["a", "x"]) == {"a": b"old", "x": b"old"}


def test_what_is_not_there_is_no_trouble(fail: Callable[..., None]) -> None:
    place = Location("flaky://nowhere")
    assert place.files() == {}
    assert place.read_all(["a"]) == {}
    place.remove("a")
    with pytest.raises(FileNotFoundError):
        place.read("a")


PARTS = [
    "shard-00001.zarr/tokens/c/0", "shard-00001.zarr/zarr.json", "shard-00001.json", "target.json",
    "target/config.json", "build.json", "manifest.json",
]  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
def test_nothing_is_taken_for_damaged(fail: Callable[..., None], part: str) -> None:
    build("flaky://c", SKETCH, [[9, 3], [12, 4]])
    before = {path: file.getvalue() for path, file in Flaky.store.items()}
    fail(part)
    for work in (lambda: verify(open_cache("flaky://c")), lambda: repair("flaky://c", "cpu")):
        with pytest.raises(StoreError, match=f"^flaky://c/.*{part.rsplit('/')[-1]} cannot be read: 503 Slow Down"):
            work()
    fail("nothing")
    assert {path: file.getvalue() for path, file in Flaky.store.items()} == before
    assert verify(open_cache("flaky://c")) == []


def test_training_does_not_say_that_an_object_is_missing(fail: Callable[..., None]) -> None:
    build("flaky://c", SKETCH, [[9, 3], [12, 4]])
    cache = open_cache("flaky://c")
    fail("shard-00001.zarr/tokens/c/0")
    with pytest.raises(StoreError, match="cannot be read: 503 Slow Down"):
        list(cache.documents())


def test_a_manifest_is_not_written_without_its_notes(fail: Callable[..., None]) -> None:
    build("flaky://c", SKETCH, [[9, 3]])
    whole = Location("flaky://c").read("manifest.json")
    fail("build.json")
    with pytest.raises(StoreError, match=r"build\.json cannot be read"):
        write_manifest("flaky://c", SKETCH, 1)
    fail("nothing")
    assert Location("flaky://c").read("manifest.json") == whole


def test_a_place_that_cannot_be_listed_is_not_taken_for_empty(fail: Callable[..., None]) -> None:
    fail("/c")
    with BuildLock(Location("flaky://c")), pytest.raises(StoreError, match="flaky://c cannot be listed"):
        begin("flaky://c", SKETCH)
