"""The evaluation record: what `specauf evaluate` writes and `specauf report` reads."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from specauf.cache.schema import Manifest
from specauf.errors import UserError
from specauf.evaluation.compare import compare, united
from specauf.evaluation.record import FORMAT
from specauf.evaluation.summary import (
    bootstrap_paired,
    bootstrap_tau,
    conditional_acceptance,
    survival,
    tau_per_prompt,
    tau_pooled,
)

Row = Mapping[str, Any]


def summarise_run(rows: Sequence[Row], name: str, slots: int) -> dict[str, Any]:
    """Figures of one drafter over the prompts of one benchmark and setting.

    Args:
        rows: of `evaluate_prompts`.
        name: the drafter's.
        slots: its drafted slots.

    Raises:
        UserError: no answer has a second token, so nothing was drafted.
    """
    parts, plain, generate = (
        [pick(row) for row in rows] for pick in (lambda r: r["drafters"][name], _plain, _generate)
    )
    accepted = [part["accepted"] for part in parts]
    if not any(accepted):
        raise UserError(
            f"benchmark {rows[0]['benchmark']}: all {len(rows)} answers end with their first token, so nothing was "
            "drafted: give other prompts"
        )
    tokens, seconds = _sums(parts, "tokens"), _sums(parts, "seconds")
    plain_tokens, plain_seconds = _sums(plain, "tokens"), _sums(plain, "seconds")
    generated, generate_seconds = _sums(generate, "tokens"), _sums(generate, "seconds")
    speed, baseline = tokens.sum() / seconds.sum(), plain_tokens.sum() / plain_seconds.sum()
    total = tokens.sum()
    split = {k: float(_sums(parts, f"{k}_seconds").sum()) for k in ("prefill", "draft", "verify", "other")}
    record = {
        "tau_pooled": tau_pooled(accepted),
        "tau_pooled_95": bootstrap_tau(accepted),
        "tau_per_prompt": tau_per_prompt(accepted),
        "accepted_pooled": tau_pooled(accepted) - 1,
        "accepted_per_slot": survival(accepted, slots),
        "conditional_acceptance": conditional_acceptance(accepted, slots),
        "tokens_per_second": float(speed),
        "baseline_tokens_per_second": float(baseline),
        "generate_tokens_per_second": float(generated.sum() / generate_seconds.sum()),
        "speedup": float(speed / baseline),
        "speedup_95": bootstrap_paired(tokens, seconds, plain_tokens, plain_seconds),
        "speedup_over_generate": float(speed / (generated.sum() / generate_seconds.sum())),
        "milliseconds_per_token": {k: 1000 * v / float(total) for k, v in split.items()},
        "draft_share": split["draft"] / float(seconds.sum()),
        "verify_share": split["verify"] / float(seconds.sum()),
        "prompts": len(rows),
        "tokens": int(total),
        "cycles": sum(len(a) for a in accepted),
        "by_prompt": {
            "task_id": [row["task_id"] for row in rows],
            "digest": [row["digest"] for row in rows],
            "ids": [row["ids"] for row in rows],
            "accepted": [sum(a) for a in accepted],
            "cycles": [len(a) for a in accepted],
        },
    }
    if "identical" in parts[0]:
        record["lossless"] = all(part["identical"] for part in parts)
    return record


def _plain(row: Row) -> Any:
    return row["plain"]


def _generate(row: Row) -> Any:
    return row["generate"]


def _sums(parts: Sequence[Mapping[str, Any]], field: str) -> np.ndarray:
    return np.array([part[field] for part in parts], float)


def part_record(rows: Sequence[Row], slots: Mapping[str, int]) -> dict[str, Any]:
    """The figures of one benchmark decoded in one setting."""
    runs = {name: summarise_run(rows, name, count) for name, count in slots.items()}
    setting = rows[0]["setting"]
    bench = setting | {"name": rows[0]["benchmark"], "setting": setting["name"], "prompts": len(rows)}
    part: dict[str, Any] = {
        "benchmark": bench,
        "runs": runs,
        "comparisons": compare(runs),
    }
    if setting["temperature"] == 0:
        ways = [(row, "plain", row["plain"]) for row in rows]
        ways += [(row, name, row["drafters"][name]) for row in rows for name in slots]
        part["divergences"] = [
            {"task_id": row["task_id"], "decoder": name, **found["divergence"]}
            for row, name, found in ways
            if not found["identical"]
        ]
        part["lossless"] = not part["divergences"]
    return part


def evaluation_record(
    rows: Sequence[Row],
    slots: Mapping[str, int],
    manifest: Manifest | None,
    *,
    target: str,
    identity: Mapping[str, str],
    dtype: str,
    drafters: Mapping[str, str],
    training: Mapping[str, Any],
) -> dict[str, Any]:
    """The JSON record of one evaluation.

    At the top stand the runs of the first benchmark and setting; `parts` holds those of all.

    Args:
        rows: of `evaluate_prompts`.
        slots: drafted slots of each drafter.
        manifest: of the cache the drafters were trained on.
        target: what the user called it.
        identity: what tells it from others.
        dtype: what it computed in.
        drafters: digest of each drafter's weights.
        training: curves of each drafter's training, where there are any.
    """
    grouped = [list(group) for _, group in groupby(rows, key=lambda r: (r["benchmark"], r["setting"]))]
    parts = [part_record(group, _fitting(slots, group)) for group in grouped]
    greedy = [part for part in parts if "lossless" in part]
    record: dict[str, Any] = {
        "format": FORMAT,
        "target": target,
        "identity": dict(identity),
        "dtype": dtype,
        "drafters": dict(drafters),
    }
    if manifest is not None:
        record["corpus"] = manifest.identity.corpus
        record["cache"] = {
            "tokens": manifest.counts.tokens,
            "documents": manifest.counts.documents,
            "supervised_tokens": manifest.counts.supervised_tokens,
            "bytes_per_token": manifest.total_bytes / manifest.counts.tokens,
            "head_mass_mean": manifest.counts.head_mass_mean,
        }
    return record | {
        **{key: parts[0][key] for key in ("benchmark", "runs", "comparisons")},
        "lossless": all(part["lossless"] for part in greedy) if greedy else None,
        "divergences": [d for part in greedy for d in part["divergences"]],
        "parts": parts,
        "training": dict(training),
        "environment": united([row["environment"] for row in rows]),
    }


def _fitting(slots: Mapping[str, int], rows: Sequence[Row]) -> dict[str, int]:
    """Drafted slots in the setting of some rows."""
    block = rows[0]["setting"]["block_size"]
    return {name: min(count, block - 1) if block else count for name, count in slots.items()}
