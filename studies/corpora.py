"""The study's corpora beside `python-stdlib`, as JSONL files in a directory.

python -m studies.corpora DIR --questions FILE [--skip N]

- raw.jsonl: the first functions of the standard library with the answers that their authors gave, which the target did
  not write;
- mixed.jsonl: as many prompts, half of them the standard library's, half the questions of a JSONL file with a `turns`
  list a row, such as GSM8K's, without the first ones, which a benchmark decodes.
"""

import argparse
import ast
import json
import sys
import sysconfig
import textwrap
from collections.abc import Collection
from importlib.util import decode_source
from pathlib import Path

from cache_builder.stdlib_corpus import documented_functions, stdlib_prompts
from specauf.errors import UserError, run_command
from specauf.evaluation.benchmarks import load_benchmark

DOCUMENTS = 1280


def author_answers(root: Path, prompts: Collection[str]) -> dict[str, str]:
    """What stands in the library for each of some prompts."""
    wanted = set(prompts)
    found = {}
    for prompt, node, path in documented_functions(root):
        if prompt in wanted:
            code = ast.get_source_segment(decode_source(path.read_bytes()), node, padded=True) or ""
            found[prompt] = f"```python\n{textwrap.dedent(code)}\n```"
    return found


def main() -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--questions", required=True)
    parser.add_argument("--skip", type=int, default=128)
    return run_command(lambda: _write(parser.parse_args()))


def _write(args: argparse.Namespace) -> None:
    prompts = stdlib_prompts()[:DOCUMENTS]
    answers = author_answers(Path(sysconfig.get_path("stdlib")), prompts)
    half = DOCUMENTS // 2
    questions = [p.text for p in load_benchmark(args.questions)][args.skip :][:half]
    if len(questions) < half:
        raise UserError(
            f"{args.questions} has {len(questions)} questions after the first {args.skip}, {half} are needed"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    _lines(args.out / "raw.jsonl", [{"prompt": p, "response": answers[p]} for p in prompts])
    _lines(args.out / "mixed.jsonl", [{"prompt": p} for p in [*prompts[:half], *questions]])


def _lines(file: Path, rows: list[dict[str, str]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{len(rows):,} documents: {file}")


if __name__ == "__main__":
    sys.exit(main())
