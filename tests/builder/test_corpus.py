"""Corpora: every layout of rows, and whatever odd thing a file holds ends in documents or in one line."""

import ast
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cache_builder.corpus import CorpusConfig, open_corpus
from cache_builder.formats import FORMATS, Conversation, Message, parse_row
from cache_builder.stdlib_corpus import documented_functions
from specauf.errors import UserError
from tests.builder.conftest import write_jsonl

ASKED = (Message("user", "why?"), Message("assistant", "because"))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "because"}]}, ASKED),
        ({"conversations": [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "because"}]}, ASKED),
        ({"prompt": "why?", "response": "because"}, ASKED),
        ({"question": "why?", "answer": "because"}, ASKED),
        (
            {"instruction": "add", "input": "1 2", "output": "3"},
            (Message("user", "add\n\n1 2"), Message("assistant", "3")),
        ),
        ({"turns": ["why?", "and?"]}, (Message("user", "why?"), Message("user", "and?"))),
        (
            {"system": "be brief", "conversations": [{"from": "human", "value": "why?"}]},
            (Message("system", "be brief"), Message("user", "why?")),
        ),
        (
            {"prompt": [{"role": "user", "content": "why?"}], "chosen": [{"role": "assistant", "content": "because"}]},
            ASKED,
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": t} for t in ("wh", "y?")]}]},
            ASKED[:1],
        ),
    ],
)  # fmt: skip
def test_every_layout_is_found(row: dict[str, Any], expected: tuple[Message, ...]) -> None:
    assert parse_row(row, None, "row 1").messages == expected


@pytest.mark.parametrize(
    ("row", "form", "message"),
    [
        ([1], None, "the row is a list, expected an object"),
        ({"colour": "red"}, None, "columns are 'colour', expected messages, conversations"),
        ({"messages": "hello"}, None, "messages is text, expected a list"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, None, r"messages\[0\].role is 'wizard', expected one of"),
        ({"messages": [{"role": "user", "content": 7}]}, None, r"messages\[0\].content is a number, expected text"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, None, "expected a part of type text"),
        ({"prompt": "a"}, "messages", "column messages is missing, found 'prompt'"),
        ({"text": "\ud800"}, None, "half of a surrogate pair"),
        ({"prompt": "x\ud800"}, None, "prompt holds half of a surrogate pair at character 1"),
        ({"instruction": "add", "input": "\ud800"}, None, "input holds half of a surrogate pair"),
        ({"conversations": [{"from": "human", "value": 7}]}, None, r"conversations\[0\].value is a number"),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
            None,
            r"messages\[0\] holds tool_calls",
        ),
    ],
)
def test_a_bad_row_names_the_field_and_what_stands_there(row: Any, form: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"row 9.*{message}|{message}") as caught:
        parse_row(row, form, "row 9")
    assert "\n" not in str(caught.value)


def test_broken_json_names_its_line(tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": f"question {i}"}) for i in range(9)]
    lines[6] = '{"prompt": "question 6'
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"c\.jsonl line 7 is not JSON: Unterminated string.*column 12") as caught:
        list(open_corpus(CorpusConfig(str(tmp_path / "c.jsonl"))))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("c.jsonl", b"", "is empty: expected at least one document"),
        ("c.txt", b"\n\n  \n", "is empty"),
        ("c.jsonl", b'{"text": "caf\xe9"}', "is not UTF-8: byte 13 is 0xe9"),
        ("c.json", b"[1, 2", "is not JSON"),
        ("c.docx", b"x", "has the suffix '.docx', expected one of"),
        ("c.parquet", b"not parquet", "cannot be loaded"),
        ("c.jsonl", b"[" * 100_000, "line 1 is not JSON"),
        ("c.jsonl", b'{"n": ' + b"9" * 5000 + b"}", "line 1 is not JSON that can be read"),
    ],
)
def test_files_that_are_no_corpus(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        list(open_corpus(CorpusConfig(str(tmp_path / name))))
    assert "\n" not in str(caught.value)


def test_functions_are_found_wherever_a_statement_stands(tmp_path: Path) -> None:
    places = [
        "if x:\n    @\nelse:\n    @", "for x in y:\n    @\nelse:\n    @", "while x:\n    @", "with x:\n    @",
        "try:\n    @\nexcept A:\n    @\nelse:\n    @\nfinally:\n    @", "try:\n    pass\nexcept* A:\n    @",
        "match x:\n    case 1:\n        @", "class A:\n    class B:\n        @", "@",
        "async def f():\n    async with x:\n        @",
    ]  # fmt: skip
    text = "\n".join(places)
    for n in range(text.count("@")):
        text = text.replace("@", f"def f{n}(a=lambda: 0): 'A docstring that says a little of it.'", 1)
    (tmp_path / "a.py").write_text(text)
    names = [node.name for _, node, _ in documented_functions(tmp_path)]  # type: ignore[attr-defined]
    walked = [node.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    assert names == walked
    assert len(names) == text.count("docstring") == 15


def test_directories_and_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    with pytest.raises(UserError, match="directory without"):
        open_corpus(CorpusConfig(str(tmp_path)))
    rows = [{"prompt": f"question {i}"} for i in range(5)]
    for part in (rows[:2], rows[2:]):
        (tmp_path / f"{len(part)}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in part))
    corpus = open_corpus(CorpusConfig(str(tmp_path)))
    assert [c.messages[0].content for c in corpus] == [r["prompt"] for r in rows]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "p.parquet"))
    with pytest.raises(UserError, match=r"mixes \.jsonl, \.parquet"):
        open_corpus(CorpusConfig(str(tmp_path)))
    corpus = open_corpus(CorpusConfig(str(tmp_path / "p.parquet")))
    assert [c.messages[0].content for c in corpus] == [r["prompt"] for r in rows]
    found = [corpus[number] for number in range(len(corpus))]
    monkeypatch.setattr(datasets.Dataset, "__getitem__", None)  # in order they come faster
    assert list(corpus) == found


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
def test_words_about_data_are_no_data(tmp_path: Path, kind: str) -> None:
    import datasets

    rows = datasets.Dataset.from_list([{"prompt": f"question {i}"} for i in range(5)])
    (rows.to_parquet if kind == ".parquet" else rows.to_json)(str(tmp_path / f"data{kind}"))
    for name in ("README.md", "LICENSE.txt", "dataset_infos.json", "notes.txt", ".gitattributes"):
        (tmp_path / name).write_text("{}")
    corpus = open_corpus(CorpusConfig(str(tmp_path)))
    assert [c.messages[0].content for c in corpus] == rows["prompt"]
    assert f"LICENSE.txt, README.md, dataset_infos.json and 1 more left out as words about the {kind}" in corpus.note
    assert open_corpus(CorpusConfig(str(tmp_path / f"data{kind}"))).note == ""
    (tmp_path / f"data{kind}").unlink()
    with pytest.raises(UserError, match=r"mixes \.json, \.md, \.txt"):
        open_corpus(CorpusConfig(str(tmp_path)))


def test_a_build_says_what_it_leaves_out(tiny_target_dir: Path, tmp_path: Path, capsys: Any) -> None:
    from cache_builder.driver import build
    from tests.builder.test_build import config

    folder = tmp_path / "data"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", [{"prompt": f"question number {i}"} for i in range(4)])
    (folder / "README.md").write_text("Questions.")
    build(config(tiny_target_dir, folder, tmp_path / "cache", features="int8"))
    assert f"note: corpus {folder}: README.md left out as words about the .jsonl files" in capsys.readouterr().err


def test_places_that_cannot_be_read_are_one_line(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "c.jsonl")
    with pytest.raises(UserError, match="is a pipe or device, which cannot be read twice: write it to a file first"):
        open_corpus(CorpusConfig(str(tmp_path / "c.jsonl")))
    with pytest.raises(UserError, match=r"~nobody-of-that-name/c\.jsonl does not exist"):
        open_corpus(CorpusConfig("~nobody-of-that-name/c.jsonl"))
    with pytest.raises(UserError, match="cannot be read: File name too long"):
        open_corpus(CorpusConfig("question " * 99))


TEXTS = st.text(st.characters(), max_size=12)
NAMES = st.sampled_from(
    ["messages", "conversations", "turns", "text", "prompt", "question", "instruction", "response", "answer", "output",
     "role", "from", "content", "value", "type", "system", "tool_calls", "chosen"]
) | TEXTS  # fmt: skip
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | TEXTS
    | st.sampled_from(["user", "assistant", "gpt", "tool"])
)
VALUES = st.recursive(SCALARS, lambda v: st.lists(v, max_size=4) | st.dictionaries(NAMES, v, max_size=4), max_leaves=12)
TURNS = st.lists(st.fixed_dictionaries({"role": SCALARS, "content": SCALARS}) | VALUES, max_size=4)
ROWS = VALUES | st.dictionaries(NAMES, VALUES | TURNS, max_size=4)


@given(row=ROWS, form=st.none() | st.sampled_from(FORMATS))
@settings(max_examples=1000, suppress_health_check=[HealthCheck.too_slow])
@example(row={"messages": [{}]}, form=None)
def test_a_thousand_odd_rows_end_in_a_document_or_one_line(row: Any, form: Any) -> None:
    try:
        found = parse_row(row, form, "here")
    except UserError as error:
        said = str(error)
        assert "\n" not in said.replace("\\n", "")
        assert len(said) < 2000
        return
    assert isinstance(found, Conversation)
    for message in found.messages:
        assert message.role in ("system", "user", "assistant", "tool")
        message.content.encode()
    assert found.text is None or not found.messages


@given(
    lines=st.lists(st.binary(max_size=30) | ROWS.map(lambda r: json.dumps(r, ensure_ascii=True).encode()), max_size=6),
    name=st.sampled_from(["c.jsonl", "c.json", "c.txt"]),
)
@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
def test_odd_files_end_in_documents_or_one_line(tmp_path: Path, lines: list[bytes], name: str) -> None:
    (tmp_path / name).write_bytes(b"\n".join(lines))
    try:
        found = list(open_corpus(CorpusConfig(str(tmp_path / name))))
    except UserError as error:
        said = str(error)
        assert "\n" not in said
        return
    assert found
