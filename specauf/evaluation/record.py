"""Evaluation records on disk."""

import json
from pathlib import Path
from typing import Any, NoReturn, NotRequired, TypedDict

from specauf.errors import UserError
from specauf.typed_json import typed

EVALUATION = "evaluation.json"
FORMAT = 2
REMEDY = "run `specauf evaluate` again"


class _Benchmark(TypedDict):
    name: str
    setting: str
    prompts: int
    fewest_prompts: NotRequired[int]  # of joined evaluations
    max_new_tokens: int
    temperature: float
    block_size: int | None


class _ByPrompt(TypedDict):
    task_id: list[str]
    digest: list[str]
    ids: NotRequired[list[str]]  # not in early records
    accepted: list[int]
    cycles: list[int]


class _Milliseconds(TypedDict):
    prefill: float
    draft: float
    verify: float
    other: float


class _Run(TypedDict):
    tau_pooled: float
    tau_pooled_95: tuple[float, float]
    tau_per_prompt: float
    accepted_per_slot: list[float]
    conditional_acceptance: list[float | None]
    tokens_per_second: float
    baseline_tokens_per_second: float
    generate_tokens_per_second: float
    speedup: float
    speedup_95: tuple[float, float]
    speedup_over_generate: float
    milliseconds_per_token: _Milliseconds
    by_prompt: _ByPrompt


class _Comparison(TypedDict):
    tau_ratio: float
    tau_ratio_95: tuple[float, float]
    prompts: int
    other_tokens: NotRequired[int | None]


class _Divergence(TypedDict):
    task_id: str
    decoder: str
    position: int
    logit_gap: float | None
    near_tie: bool


class _Part(TypedDict):
    benchmark: _Benchmark
    runs: dict[str, _Run]
    comparisons: dict[str, _Comparison]
    lossless: NotRequired[bool]  # of greedy decoding, with its divergences
    divergences: NotRequired[list[_Divergence]]


class _Cache(TypedDict):
    tokens: int
    documents: int
    bytes_per_token: float
    head_mass_mean: float


class _Environment(TypedDict):
    date: str
    device: str


class _Curve(TypedDict):
    step: list[float]
    value: list[float]


class _Record(TypedDict):
    """What reports and audits read of a record; there may be more in it."""

    target: str
    identity: NotRequired[dict[str, str]]  # early records have neither this nor what their drafters were
    drafters: NotRequired[dict[str, str]]
    dtype: str
    cache: NotRequired[_Cache]
    benchmark: _Benchmark
    runs: dict[str, _Run]
    lossless: bool | None
    divergences: list[_Divergence]
    parts: list[_Part]
    training: NotRequired[dict[str, dict[str, _Curve]]]
    environment: _Environment


def save_record(record: dict[str, Any], file: Path) -> None:
    """Write one."""
    file.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n")


def read_record(source: Path) -> dict[str, Any]:
    """An evaluation record.

    Raises:
        UserError: it is missing or is something else, or a field is missing or of another type.
    """
    if not source.is_file():
        raise UserError(f"{source} does not exist: run `specauf evaluate` first or name its {EVALUATION}")
    try:
        record = json.loads(source.read_text(), parse_constant=_no_number)
    except ValueError as error:
        raise UserError(f"{source} is not JSON: {REMEDY}") from error
    version = record.get("format") if isinstance(record, dict) else None
    if version != FORMAT:
        raise UserError(
            f"{source}: format {version} found, {FORMAT} expected: run `specauf evaluate` with another --out"
        )
    for name in (n for n in ("runs", "parts") if not record.get(n)):
        raise UserError(f"{source}: {name} missing: it is not whole, {REMEDY}")
    typed(_Record, record, str(source), REMEDY)
    _check_agreement(record, source)
    return dict(record)


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")  # Python reads NaN and Infinity all the same


def _check_agreement(record: dict[str, Any], source: Path) -> None:
    """Refuse names that stand in one place alone, and lists of one thing that differ in length."""
    training = record.get("training", {})
    named = {"drafters": record.get("drafters", {}), "training": training}
    columns: dict[str, tuple[dict[str, Any], Any]] = {
        f"training[{run!r}][{name!r}]": (c, _Curve) for run, found in training.items() for name, c in found.items()
    }
    for i, part in enumerate(record["parts"]):
        if not part["runs"]:
            raise UserError(f"{source}: parts[{i}]: runs is empty: {REMEDY}")
        named[f"parts[{i}]: runs"] = part["runs"]
        columns |= {
            f"parts[{i}]: runs[{n!r}]: by_prompt": (run["by_prompt"], _ByPrompt) for n, run in part["runs"].items()
        }
    for field, found in named.items():
        if unknown := found.keys() - record["runs"].keys():
            known = ", ".join(record["runs"])
            raise UserError(f"{source}: {field} has {min(unknown)}, runs has {known} alone: {REMEDY}")
    for field, (found, kind) in columns.items():
        lengths = {name: len(found[name]) for name in kind.__annotations__ if name in found}
        if len(set(lengths.values())) > 1:
            said = ", ".join(f"{count} in {name}" for name, count in sorted(lengths.items()))
            raise UserError(f"{source}: {field} has lists of several lengths ({said}): {REMEDY}")
