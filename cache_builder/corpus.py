"""Where documents come from: the standard library, local files, and data sets of the hub."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache_builder import stdlib_corpus
from cache_builder.formats import Conversation, Format, Message, parse_row
from cache_builder.rows import FileRows
from specauf.configs import known_configs
from specauf.errors import UserError, unknown_name
from specauf.targets import quiet_transformers

JSON_SUFFIXES, PARQUET_SUFFIXES, TEXT_SUFFIXES = (".jsonl", ".json", ".ndjson"), (".parquet",), (".txt", ".md", ".text")
_KNOWN = (*JSON_SUFFIXES, *PARQUET_SUFFIXES, *TEXT_SUFFIXES)
# What `datasets` passes over as well: files that speak of the data beside them.
_ABOUT_DATA = frozenset({"config.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json"})


@dataclass(frozen=True)
class CorpusConfig:
    """Which documents to read.

    Attributes:
        source: `python-stdlib`, a local file or directory of files, or a hub data set's id.
        format: how rows are laid out; None finds out from the first row.
        subset: the hub data set's configuration.
        split: the hub data set's split.
        revision: the hub data set's branch, tag or commit.
    """

    source: str
    format: Format | None = None
    subset: str | None = None
    split: str = "train"
    revision: str | None = None


class Corpus:
    """Documents by number. Rows are parsed when asked for, so a large corpus stays on disk.

    Args:
        name: for messages and the cache's identity.
        rows: by number: a list, or a data set on disk.
        where: a row's place by its number, for messages.
        form: layout of the rows; None looks at each.

    Attributes:
        note: what a user should hear of how it was read; empty when nothing.
    """

    def __init__(self, name: str, rows: Any, where: Callable[[int], str], form: Format | None = None) -> None:
        self.name, self.rows, self.where, self.form = name, rows, where, form
        self.note = ""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Conversation:
        return self._parse(number, self.rows[number])

    def __iter__(self) -> Iterator[Conversation]:
        # A data set gives rows in their order in a third of the time that it takes to ask for each by its number.
        return (self._parse(number, row) for number, row in enumerate(self.rows))

    def _parse(self, number: int, row: Any) -> Conversation:
        return row if isinstance(row, Conversation) else parse_row(row, self.form, self.where(number))


def open_corpus(config: CorpusConfig) -> Corpus:
    """The documents that a corpus config means.

    Raises:
        UserError: there is nothing of that name, it cannot be read, or it is empty.
    """
    try:
        corpus = _open(config)
    except OSError as error:
        raise UserError(f"corpus {config.source[:80]} cannot be read: {error.strerror or error}") from error
    if not len(corpus):
        raise UserError(f"corpus {config.source} is empty: expected at least one document")
    return corpus


def _open(config: CorpusConfig) -> Corpus:
    source, path = config.source, Path(config.source)
    with contextlib.suppress(RuntimeError):  # ~NAME of nobody here
        path = path.expanduser()
    if source == stdlib_corpus.NAME:
        rows = [Conversation((Message("user", p),)) for p in stdlib_corpus.stdlib_prompts()]
        return Corpus(source, rows, lambda i: f"{source} function {i}")
    if path.exists():
        return _open_local(config, path)
    if source.endswith(_KNOWN) or source.startswith((".", "/", "~")):
        raise UserError(f"corpus {source} does not exist: give an existing file, a hub id, or {stdlib_corpus.NAME}")
    if source.count("/") > 1 or not source.strip():
        raise UserError(f"corpus {source!r} is no file and no hub id (owner/name): give one of these")
    if "/" not in source:
        raise unknown_name("corpus", source, {stdlib_corpus.NAME, *known_configs("corpus")})
    return _open_hub(config)


def _open_local(config: CorpusConfig, path: Path) -> Corpus:
    files, others = ([path], []) if path.is_file() else _files_in(path)
    kinds = {suffix for f in files for suffix in _KNOWN if f.name.lower().endswith(suffix)}
    if len(kinds) != 1:
        what = f"has the suffix {files[0].suffix!r}" if not kinds else f"mixes {', '.join(sorted(kinds))}"
        raise UserError(f"corpus {path} {what}, expected one of {', '.join(_KNOWN)}")
    kind = kinds.pop()
    if kind in PARQUET_SUFFIXES:
        corpus = _open_parquet(config, files)
    else:
        rows = FileRows(files, text=kind in TEXT_SUFFIXES)
        corpus = Corpus(config.source, rows, rows.where, config.format)
    if others:
        names = ", ".join(f.name for f in others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
        corpus.note = f"corpus {path}: {names} left out as words about the {kind} files: to read one, give it alone"
    return corpus


def _files_in(folder: Path) -> tuple[list[Path], list[Path]]:
    """A directory's files of data; and those that only speak of data, where there is any.

    Raises:
        UserError: there are none, or it is no directory.
    """
    if not folder.is_dir():
        raise UserError(f"corpus {folder} is a pipe or device, which cannot be read twice: write it to a file first")
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in _KNOWN)
    if not files:
        raise UserError(f"corpus {folder} is a directory without {', '.join(_KNOWN)} files: give a file")
    others = [f for f in files if f.name in _ABOUT_DATA or f.suffix.lower() in TEXT_SUFFIXES]
    data = [f for f in files if f not in others]
    return (data, others) if data else (files, [])


def _open_parquet(config: CorpusConfig, files: list[Path]) -> Corpus:
    rows = _load_dataset("parquet", config, data_files=[str(f) for f in files], split="train")
    return Corpus(config.source, rows, lambda i: f"{config.source} row {i}", config.format)


def _open_hub(config: CorpusConfig) -> Corpus:
    rows = _load_dataset(config.source, config, name=config.subset, split=config.split, revision=config.revision)
    return Corpus(config.source, rows, lambda i: f"{config.source} row {i}", config.format)


def _load_dataset(path: str, config: CorpusConfig, **options: Any) -> Any:
    """`datasets.load_dataset` with its many errors in one line."""
    import datasets
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    try:
        with quiet_transformers():
            return datasets.load_dataset(path, **options)
    except (OSError, ValueError, ImportError, RuntimeError, DatasetGenerationError, DatasetNotFoundError) as error:
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        said = " ".join(str(cause).split())[:200] or type(cause).__name__
        raise UserError(
            f"corpus {config.source} cannot be loaded: {said} -- check its id, --corpus_subset, --corpus_split "
            "and the network, or give a local file"
        ) from error
