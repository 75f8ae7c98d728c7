import json

import datasets
import pytest

from specauf.errors import UserError
from specauf.evaluation.benchmarks import HUB, benchmark_name, load_benchmark


def test_humaneval_comes_from_its_package():
    prompts = load_benchmark("humaneval")
    assert len(prompts) == 164
    assert prompts[0].task_id == "HumanEval/0"
    assert "has_close_elements" in prompts[0].text


def test_turns_and_prompt_fields(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"turns": ["first", "second"]}\n\n{"prompt": "other"}\n')
    assert [(p.task_id, p.text) for p in load_benchmark(str(path))] == [("mine/1", "first"), ("mine/3", "other")]
    assert len(load_benchmark(str(path), limit=1)) == 1


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "holds no prompt"),
        ("\n\n", "holds no prompt"),
        ('{"prompt": "a"}\n{broken', "line 2 is not JSON"),
        ('{"question": "a"}', "line 1 has question"),
        ('{"turns": []}', "line 1 has turns"),
        ('{"prompt": 3}', "line 1 has prompt"),
        ("[1, 2]", "line 1 has list"),
        ("{}", "line 1 has no field"),
        ('{"prompt": "a \\ud800 b"}', "line 1 holds half of a surrogate pair"),
        ('{"prompt": ' + "9" * 5000 + "}", "line 1 is not JSON"),
        ("[" * 100_000, "line 1 is not JSON"),
    ],
)
def test_malformed_files_are_named_with_their_line(tmp_path, content, says):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=says) as caught:
        load_benchmark(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("mt-bench", {"prompt": "hello there"}),
        ("mt-bench", {"prompt": [None]}),
        ("gsm8k", {"question": None}),
        ("math500", {"problem": 5}),
        ("alpaca", {"instruction": 5, "input": "x"}),
        ("alpaca", {"instruction": "add", "input": ["x"]}),
    ],
)
def test_rows_of_a_known_set_whose_fields_are_no_text(tmp_path, name, row):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(UserError, match=f"give the fields of {name}"):
        load_benchmark(f"{name}={path}")


def test_a_mark_of_byte_order_is_no_part_of_the_first_row(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "a"}', encoding="utf-8-sig")
    assert load_benchmark(str(path))[0].text == "a"


@pytest.mark.parametrize(
    ("name", "limit", "says"),
    [
        ("nosuch", None, "unknown benchmark 'nosuch'"),
        ("humanevil", None, "Did you mean humaneval"),
        ("missing.jsonl", None, "does not exist"),
        ("humaneval", 0, "limit is 0"),
    ],
)
def test_wrong_names_and_limits(name, limit, says):
    with pytest.raises(UserError, match=says):
        load_benchmark(name, limit)


ROWS = {
    "gsm8k": ({"question": "1 + 1?", "answer": "2"}, "1 + 1?\nPlease reason step by step"),
    "math500": ({"problem": "x = ?", "solution": "1"}, "x = ?\nPlease reason step by step"),
    "mbpp": ({"prompt": "Write a loop.", "code": "..."}, "Write a loop."),
    "mt-bench": ({"prompt": ["first turn", "second"]}, "first turn"),
    "alpaca": ({"instruction": "Sort.", "input": "3 1"}, "Sort.\n\nInput:\n3 1"),
}


def test_every_hub_set_is_tested():
    assert set(ROWS) == set(HUB)


@pytest.mark.parametrize("name", ROWS)
def test_known_sets_come_from_the_hub_or_a_file(name, tmp_path, monkeypatch):
    row, starts = ROWS[name]
    asked = []

    def load_dataset(place, subset, split):
        asked.append((place, subset, split))
        return datasets.Dataset.from_list([row] * 3)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    from_hub = load_benchmark(name, 2)
    assert asked == [(HUB[name].place, HUB[name].subset, HUB[name].split)]
    assert [p.task_id for p in from_hub] == [f"{name}/1", f"{name}/2"]
    assert from_hub[0].text.startswith(starts)
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    assert load_benchmark(f"{name}={path}")[0].text == from_hub[0].text
    assert benchmark_name(f"{name}={path}") == name


def test_parquet_files(tmp_path):
    path = tmp_path / "mine.parquet"
    datasets.Dataset.from_list([{"prompt": "a"}, {"prompt": "b"}]).to_parquet(path)
    assert [(p.task_id, p.text) for p in load_benchmark(str(path))] == [("mine/1", "a"), ("mine/2", "b")]


def test_a_hub_that_cannot_be_reached_says_how_to_go_on(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub\nand a traceback")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"gsm8k \(openai/gsm8k\) cannot be had.*--benchmarks=gsm8k=FILE") as caught:
        load_benchmark("gsm8k")
    assert "\n" not in str(caught.value)
