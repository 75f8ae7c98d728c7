"""Rows of local files by number: what a file holds stays on disk, but for JSON arrays, which can only be read whole."""

import bisect
import codecs
import itertools
import json
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c
import numpy as np

from cache_builder.formats import Conversation
from specauf.errors import UserError


class DiskRows:
    """The lines of a JSON Lines file, or the documents of a text file: runs of lines between blank lines.

    Of each its place and checksum are kept, 32 bytes; parsed, a corpus takes several times the file's size, on every
    rank of a build.

    Args:
        path: the file.
        text: whether it holds text.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """

    def __init__(self, path: Path, *, text: bool) -> None:
        self.path, self.text = path, text
        found = array("q")
        try:
            with path.open("rb") as file:
                for span in _spans(path, file, joined=text):
                    found.extend(span)
        except OSError as error:
            raise _unreadable(path, error) from error
        self._spans = np.frombuffer(found, np.int64).reshape(-1, 4)

    def __len__(self) -> int:
        return len(self._spans)

    def where(self, number: int) -> str:
        """A row's file and line."""
        return f"{self.path} line {self._spans[number, 2]}"

    def __getitem__(self, number: int) -> Any:
        try:
            with self.path.open("rb", buffering=0) as file:
                return self._row(file, number)
        except OSError as error:
            raise _unreadable(self.path, error) from error

    def __iter__(self) -> Iterator[Any]:
        try:
            with self.path.open("rb") as file:
                for number in range(len(self)):
                    yield self._row(file, number)
        except OSError as error:
            raise _unreadable(self.path, error) from error

    def _row(self, file: BinaryIO, number: int) -> Any:
        start, size, line, crc = self._spans[number].tolist()
        file.seek(start)
        data = file.read(size)
        if google_crc32c.value(data) != crc:
            raise UserError(
                f"{self.where(number)} is no longer what it was when this command began: put the file back as it was, "
                "then run the same command again"
            )
        text = data.decode().removesuffix("\n")
        return Conversation(text=text) if self.text else parse_json(text, f"{self.path} line {line}")


class ArrayRows:
    """The rows of a file that holds one JSON array.

    Args:
        path: the file.

    Raises:
        UserError: it cannot be read, or is no JSON in UTF-8.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            data = path.read_bytes()
        except OSError as error:
            raise _unreadable(path, error) from error
        self.rows: list[Any] = parse_json(_decode(path, data.removeprefix(codecs.BOM_UTF8)), str(path))

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, number: int) -> str:
        """A row's file and number."""
        return f"{self.path} row {number + 1}"

    def __getitem__(self, number: int) -> Any:
        return self.rows[number]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)


class FileRows:
    """Rows of several files, one behind the other.

    Args:
        files: their paths, all of text or all of JSON.
        text: which of both.

    Raises:
        UserError: one cannot be read.
    """

    def __init__(self, files: Sequence[Path], *, text: bool) -> None:
        self._parts = [ArrayRows(f) if not text and _holds_array(f) else DiskRows(f, text=text) for f in files]
        self._ends = list(itertools.accumulate(len(part) for part in self._parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def where(self, number: int) -> str:
        """A row's place, for messages."""
        part, row = self._find(number)
        return part.where(row)

    def __getitem__(self, number: int) -> Any:
        part, row = self._find(number)
        return part[row]

    def __iter__(self) -> Iterator[Any]:
        for part in self._parts:
            yield from part

    def _find(self, number: int) -> tuple[DiskRows | ArrayRows, int]:
        index = bisect.bisect_right(self._ends, number)
        part = self._parts[index]
        return part, number - self._ends[index] + len(part)


def parse_json(text: str, where: str) -> Any:
    """One JSON value.

    Raises:
        UserError: it is none, or nested too deeply.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON: {error.msg} at column {error.colno}: {text.strip()[:40]!r}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON that can be read: {type(error).__name__}, {str(error)[:80]}") from error


def _spans(path: Path, file: BinaryIO, *, joined: bool) -> Iterator[tuple[int, int, int, int]]:
    """First byte, size, line and CRC-32C of every line that is not blank, or of every run of such lines."""
    span: tuple[int, int, int, int] | None = None
    at = 0
    for line, data in enumerate(file, 1):
        if line == 1 and data.startswith(codecs.BOM_UTF8):
            data, at = data.removeprefix(codecs.BOM_UTF8), len(codecs.BOM_UTF8)
        blank = not _decode(path, data, at).strip()
        if span is not None and joined and not blank:
            start, size, first, crc = span
            span = start, size + len(data), first, google_crc32c.extend(crc, data)
        else:
            if span is not None:
                yield span
            span = None if blank else (at, len(data), line, google_crc32c.value(data))
        at += len(data)
    if span is not None:
        yield span


def _holds_array(path: Path) -> bool:
    """Whether a .json file is one JSON array, not JSON Lines."""
    if path.suffix.lower() != ".json":
        return False
    try:
        with path.open("rb") as file:
            lines = (line.removeprefix(codecs.BOM_UTF8).decode(errors="replace").strip() for line in file)
            return next(filter(None, lines), "").startswith("[")
    except OSError as error:
        raise _unreadable(path, error) from error


def _decode(path: Path, data: bytes, at: int = 0) -> str:
    """Text of a file's bytes from byte `at` on."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: byte {at + error.start} is 0x{data[error.start]:02x}") from error


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"corpus {path} cannot be read: {error.strerror or error}")
