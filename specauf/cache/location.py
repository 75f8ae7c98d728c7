"""Where a cache lives: a local directory or any fsspec URL, with whole-object reads and atomic whole-object writes."""

import contextlib
import hashlib
import mmap
import os
import re
import shutil
import tempfile
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import fsspec
import google_crc32c
import numpy as np
from fsspec.implementations.local import LocalFileSystem

from specauf.errors import UserError

# Object names come from files that someone else may have written: no absolute path, no "..", nothing to expand.
_SAFE_NAME = re.compile(r"(?!\.{1,2}(/|$))[A-Za-z0-9_.-]+(/(?!\.{1,2}(/|$))[A-Za-z0-9_.-]+)*")
Data = typing.TypeVar("Data")
_LARGE = 4 << 20  # bytes
# No user's file is called so: what a killed writer left is swept away.
TEMPORARY = ".specauf-tmp-"
_TEMPORARY = re.compile(rf"{re.escape(TEMPORARY)}\d+$")


class StoreError(UserError):
    """A store did not answer, or refused: what was asked for may well be there, and whole."""


def is_safe_name(name: str) -> bool:
    """Whether an object's name stays inside its directory, on every file system."""
    return _SAFE_NAME.fullmatch(name) is not None


def sha256(data: bytes | memoryview) -> str:
    """The digest every record of a cache uses, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def crc32c(data: bytes | memoryview) -> int:
    """The checksum that reading compares: finds damage but no forgery, at memory speed."""
    return int(google_crc32c.value(np.frombuffer(data, np.uint8) if isinstance(data, memoryview) else data))


@dataclass(frozen=True)
class Location:
    """A directory, local or remote, and the few operations a cache needs of it.

    Attributes:
        url: a path or any URL that fsspec knows.
    """

    url: str

    @cached_property
    def _parts(self) -> tuple[fsspec.AbstractFileSystem, str]:
        try:
            filesystem, root = fsspec.core.url_to_fs(self.url)
        except ImportError as error:
            raise UserError(f"{self.url} cannot be opened: {error}") from error
        except ValueError as error:
            raise UserError(f"{self.url} is not a path or URL that fsspec knows: {error}") from error
        return filesystem, root.rstrip("/") or "/"

    @property
    def local(self) -> Path | None:
        """The directory's path when it is on a local disk, else None."""
        filesystem, root = self._parts
        return Path(root) if isinstance(filesystem, LocalFileSystem) else None

    def child(self, name: str) -> "Location":
        """A directory below this one."""
        return Location(f"{self.url.rstrip('/')}/{name}")

    def read(self, name: str) -> bytes:
        """An object's bytes.

        Raises:
            FileNotFoundError: there is no such object.
            StoreError: the store does not answer, or wants credentials.
        """
        filesystem, root = self._parts
        if self.local is not None:
            return (self.local / name).read_bytes()
        with self._answers("read", name):
            data: bytes = filesystem.cat_file(f"{root}/{name}")
        return data

    def read_all(self, names: list[str]) -> dict[str, bytes]:
        """Several objects' bytes, fetched together; a missing object is absent from the answer.

        Raises:
            StoreError: the store does not answer for one of them, or wants credentials.
        """
        filesystem, root = self._parts
        if self.local is not None:
            return dict(_read_files(str(self.local), names, _read_whole))
        with self._answers("read"):
            found = filesystem.cat([f"{root}/{n}" for n in names], on_error="return") if names else {}
        tails = {filesystem._strip_protocol(f"{root}/{n}"): n for n in names}
        for path, data in found.items():
            if isinstance(data, Exception) and not isinstance(data, FileNotFoundError):
                raise self._error("read", tails[path], data) from data
        return {tails[path]: data for path, data in found.items() if not isinstance(data, Exception)}

    @contextlib.contextmanager
    def _answers(self, done: str, name: str = "") -> Iterator[None]:
        """Let a missing object through, and turn all else that a store may raise into one line."""
        try:
            yield
        except (FileNotFoundError, UserError):
            raise
        except Exception as error:  # each store has its own
            raise self._error(done, name, error) from error

    def _error(self, done: str, name: str, error: Exception) -> StoreError:
        said = " ".join(str(error).split()) or type(error).__name__
        where = f"{self.url}/{name}" if name else self.url
        return StoreError(
            f"{where} cannot be {done}: {said}; check the address and credentials, then run the same command again"
        )

    def read_views(self, names: list[str]) -> dict[str, bytes | memoryview]:
        """As `read_all`; large objects of a local disk are mapped, so that processes which read them share the memory.

        A writer puts another file in the place of one, so what is mapped stays as it was.
        """
        if self.local is None:
            return dict(self.read_all(names))
        return dict(_read_files(str(self.local), names, _read_view))

    def write(self, name: str, data: bytes) -> None:
        """Store an object whole: a reader sees the old bytes or the new, never a part.

        Raises:
            UserError: the disk is full, or the place cannot be written.
            StoreError: the store does not answer, or wants credentials.
        """
        filesystem, root = self._parts
        try:
            if self.local is not None:
                write_atomically(self.local / name, data)
                return
            with self._answers("written", name):
                filesystem.pipe_file(f"{root}/{name}", data)
        except OSError as error:
            raise UserError(
                f"cannot write {name} ({len(data):,} bytes) to {self.url}: {error.strerror or error}; "
                "make room or give another --out, then run the same command again to go on from here"
            ) from error

    def files(self) -> dict[str, int]:
        """Name and size in bytes of every object below, temporary files of killed writers left out.

        Where nothing is there are none.

        Raises:
            StoreError: the store does not answer, or wants credentials.
        """
        filesystem, root = self._parts
        if self.local is not None:
            found = dict(_walk(str(self.local), ""))
        else:
            filesystem.invalidate_cache()
            start = len(filesystem._strip_protocol(root)) + 1
            listing: dict[str, typing.Any] = {}
            with contextlib.suppress(FileNotFoundError), self._answers("listed"):
                listing = filesystem.find(root, detail=True)
            found = {path[start:]: int(info["size"] or 0) for path, info in listing.items()}
        return {name: size for name, size in sorted(found.items()) if not _TEMPORARY.search(name)}

    def exists(self) -> bool:
        """Whether anything is there.

        Raises:
            StoreError: the store does not answer, or wants credentials.
        """
        filesystem, root = self._parts
        with self._answers("read"):
            found = bool(filesystem.exists(root))
        return found

    def is_file(self) -> bool:
        """Whether it is a file, which no cache is."""
        filesystem, root = self._parts
        return bool(filesystem.isfile(root))

    def remove(self, name: str) -> None:
        """Delete an object, or everything below a directory; nothing there is fine.

        Raises:
            StoreError: the store does not answer, or wants credentials.
        """
        filesystem, root = self._parts
        if self.local is not None:
            path = self.local / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
            return
        filesystem.invalidate_cache()
        with contextlib.suppress(FileNotFoundError), self._answers("removed", name):
            filesystem.rm(f"{root}/{name}", recursive=True)

    def sweep(self) -> None:
        """Delete temporary files of killed writers on a local disk; only for who holds the directory's lock."""
        if self.local is not None:
            for path in self.local.rglob(f"*{TEMPORARY}*"):
                if _TEMPORARY.search(path.name) and path.is_file():
                    path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def as_local(self, objects: Mapping[str, bytes | memoryview]) -> Iterator[Path]:
        """A local directory with these objects: this one when it is local, else a temporary copy of `objects`."""
        if self.local is not None:
            yield self.local
            return
        with tempfile.TemporaryDirectory(prefix="specauf-") as folder:
            for name, data in objects.items():
                path = Path(folder, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
            yield Path(folder)


def _read_files(root: str, names: list[str], read: Callable[[str], Data]) -> Iterator[tuple[str, Data]]:
    for name in names:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            yield name, read(f"{root}/{name}")


def _read_whole(path: str) -> bytes:
    with open(path, "rb") as file:  # noqa: PTH123 -- a shard has dozens of small files, and a Path costs more than some
        return file.read()


def _read_view(path: str) -> bytes | memoryview:
    with open(path, "rb", buffering=0) as file:  # noqa: PTH123 -- as above
        size = os.fstat(file.fileno()).st_size
        if size < _LARGE:
            return file.readall()
        return memoryview(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ))


def _walk(folder: str, prefix: str) -> Iterator[tuple[str, int]]:
    """Name and size of every file below a directory; `os.walk` and a Path for each take three times as long."""
    try:
        entries = os.scandir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return
    with entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(entry.path, f"{prefix}{entry.name}/")
            elif not entry.is_dir():
                with contextlib.suppress(FileNotFoundError):  # a writer's temporary file may be gone by now
                    yield prefix + entry.name, entry.stat().st_size


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """Replace a file on a local disk: whatever ends the process, it holds the old bytes or the new.

    Written beside its place, whatever `TMPDIR` is: a rename does not cross file systems.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}{TEMPORARY}{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    # The rename itself must reach the disk before anything that says the object is there.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
