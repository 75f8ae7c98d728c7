import pytest

from specauf.errors import UserError
from specauf.evaluation.benchmarks import load_benchmark


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
    ],
)
def test_malformed_files_are_named_with_their_line(tmp_path, content, says):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=says) as caught:
        load_benchmark(str(path))
    assert "\n" not in str(caught.value)


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
