"""Evaluation records on disk."""

import json
from pathlib import Path
from typing import Any

from specauf.errors import UserError

EVALUATION = "evaluation.json"
FORMAT = 2


def save_record(record: dict[str, Any], file: Path) -> None:
    """Write one."""
    file.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n")


def read_record(source: Path) -> dict[str, Any]:
    """An evaluation record.

    Raises:
        UserError: it is missing or is something else.
    """
    if not source.is_file():
        raise UserError(f"{source} does not exist: run `specauf evaluate` first or name its {EVALUATION}")
    try:
        record = json.loads(source.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{source} is not JSON: run `specauf evaluate` again") from error
    version = record.get("format") if isinstance(record, dict) else None
    if version != FORMAT:
        raise UserError(
            f"{source}: format {version} found, {FORMAT} expected: run `specauf evaluate` with another --out"
        )
    for name in (n for n in ("runs", "parts") if not record.get(n)):
        raise UserError(f"{source}: {name} missing: it is not whole, run `specauf evaluate` again")
    return dict(record)
