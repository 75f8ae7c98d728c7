"""Local corpora stay on disk: rows are those of a file read whole, and only their places are kept in memory."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cache_builder.config import BuildConfig
from cache_builder.corpus import CorpusConfig, open_corpus
from cache_builder.formats import Conversation
from cache_builder.plan import make_plan
from cache_builder.rows import DiskRows
from specauf.errors import UserError
from specauf.targets import TargetConfig
from tests.builder.conftest import write_jsonl

TEXT = st.text(st.sampled_from("ab é\u2028\u3000\x1c\x85\r\ufeff"), max_size=8)


def _whole(data: bytes, *, text: bool) -> list[tuple[int, Any]]:
    """Line and row of all that a file holds, from its whole text."""
    lines = [*data.decode("utf-8-sig").split("\n"), ""]
    if not text:
        return [(n, json.loads(line)) for n, line in enumerate(lines, 1) if line.strip()]
    found: list[tuple[int, list[str]]] = []
    for n, line in enumerate(lines, 1):
        if line.strip() and n > 1 and lines[n - 2].strip():
            found[-1][1].append(line)
        elif line.strip():
            found.append((n, [line]))
    return [(n, Conversation(text="\n".join(parts))) for n, parts in found]


@given(
    lines=st.lists(TEXT, max_size=9),
    text=st.booleans(),
    bom=st.sampled_from([b"", b"\xef\xbb\xbf"]),
    end=st.sampled_from([b"", b"\n"]),
)
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_are_those_of_the_whole_file(tmp_path: Path, lines: list[str], text: bool, bom: bytes, end: bytes) -> None:
    if not text:
        lines = [json.dumps(line, ensure_ascii=False) if line.strip() else line for line in lines]
    data = bom + "\n".join(lines).encode() + end
    (tmp_path / "c").write_bytes(data)
    rows = DiskRows(tmp_path / "c", text=text)
    found = [(f"{tmp_path}/c line {n}", row) for n, row in _whole(data, text=text)]
    assert list(zip(map(rows.where, range(len(rows))), rows, strict=True)) == found
    assert [rows[n] for n in reversed(range(len(rows)))] == [row for _, row in reversed(found)]


def test_files_of_a_directory_lie_end_to_end(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('\n [{"text": "0"},\n {"text": "1"}]')
    (tmp_path / "b.json").write_text("\n")
    (tmp_path / "c.json").write_text('{"text": "2"}\n\n{"text": "3"}')
    corpus = open_corpus(CorpusConfig(str(tmp_path)))
    assert [c.text for c in corpus] == [corpus[n].text for n in range(len(corpus))] == ["0", "1", "2", "3"]
    places = ["a.json row 1", "a.json row 2", "c.json line 1", "c.json line 3"]
    assert [corpus.where(n) for n in range(4)] == [f"{tmp_path}/{place}" for place in places]


@pytest.mark.parametrize("name", ["c.jsonl", "c.txt"])
def test_a_corpus_takes_a_small_part_of_its_size_in_memory(tmp_path: Path, name: str) -> None:
    file = write_jsonl(tmp_path / name, [{"text": f"{n} {'word ' * 400}"} for n in range(1000)])
    if name == "c.txt":
        file.write_text(file.read_text().replace("\n", "\n\n"))
    tracemalloc.start()
    try:
        corpus = open_corpus(CorpusConfig(str(file)))
        assert sum(1 for _ in corpus) == 1000
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < file.stat().st_size / 4


def test_what_is_read_of_a_corpus_is_checked_before_the_target_is_loaded(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "c.jsonl", [{"prompt": f"question {n}"} for n in range(5)])
    with file.open("a") as more:
        more.write("{broken\n")
    settings = {"target": TargetConfig("none", model="nowhere"), "corpus": str(file), "out": str(tmp_path / "out")}
    with pytest.raises(UserError, match=r"c\.jsonl line 6 is not JSON: Expecting property name .* column 2: '{broken'"):
        make_plan(BuildConfig(**settings))
    assert len(make_plan(BuildConfig(**settings, max_documents=5)).numbers) == 5


def test_a_file_that_changes_under_a_build_is_one_line(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "c.jsonl", [{"prompt": f"question {n}"} for n in range(5)])
    corpus = open_corpus(CorpusConfig(str(file)))
    with file.open("a") as more:
        more.write('{"prompt": "one more"}\n')
    assert corpus[4].messages[0].content == "question 4"
    file.write_text(file.read_text().replace("question 2", "question 7"))
    assert corpus[1].messages[0].content == "question 1"
    with pytest.raises(UserError, match=r"c\.jsonl line 3 is no longer what it was when this command began: put"):
        corpus[2]
    file.unlink()
    with pytest.raises(UserError, match=r"c\.jsonl cannot be read: No such file"):
        corpus[1]
