"""The evaluation record: what `specauf evaluate` writes and `specauf report` reads."""

import datetime
import os
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from specauf import __version__
from specauf.cache.schema import Manifest
from specauf.evaluation.summary import (
    bootstrap_ratio,
    bootstrap_tau,
    conditional_acceptance,
    survival,
    tau_per_prompt,
    tau_pooled,
)


def summarise(rows: Sequence[Mapping[str, Any]], slots: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Figures of every drafter over the decoded prompts.

    Args:
        rows: of `evaluate_prompts`.
        slots: drafted slots of each drafter.
    """
    tokens = sum(row["tokens"] for row in rows)
    plain = tokens / sum(row["plain"]["seconds"] for row in rows)
    generate = tokens / sum(row["generate"]["seconds"] for row in rows)
    out = {}
    for name, count in slots.items():
        parts = [row["drafters"][name] for row in rows]
        accepted = [part["accepted"] for part in parts]
        seconds = sum(part["seconds"] for part in parts)
        draft, verify = sum(p["draft_seconds"] for p in parts), sum(p["verify_seconds"] for p in parts)
        out[name] = {
            "tau_pooled": tau_pooled(accepted),
            "tau_pooled_95": bootstrap_tau(accepted),
            "tau_per_prompt": tau_per_prompt(accepted),
            "accepted_per_slot": survival(accepted, count),
            "conditional_acceptance": conditional_acceptance(accepted, count),
            "tokens_per_second": tokens / seconds,
            "baseline_tokens_per_second": plain,
            "generate_tokens_per_second": generate,
            "speedup": tokens / seconds / plain,
            "draft_share": draft / seconds,
            "verify_share": verify / seconds,
            "prompts": len(rows),
            "tokens": tokens,
            "cycles": sum(len(a) for a in accepted),
            "lossless": all(part["identical"] for part in parts),
        }
    return out


def compare(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Paired ratio of pooled tau of each drafter to the last named one, with its 95 % interval over prompts."""
    accepted = {name: [row["drafters"][name]["accepted"] for row in rows] for name in names}
    base = names[-1]
    return {
        f"{name}/{base}": {
            "tau_ratio": tau_pooled(accepted[name]) / tau_pooled(accepted[base]),
            "tau_ratio_95": bootstrap_ratio(accepted[name], accepted[base]),
        }
        for name in names[:-1]
    }


def evaluation_record(
    rows: Sequence[Mapping[str, Any]],
    slots: Mapping[str, int],
    manifest: Manifest | None,
    *,
    target: str,
    benchmark: str,
    max_new_tokens: int,
) -> dict[str, Any]:
    """The JSON record of one evaluation."""
    runs = summarise(rows, slots)
    record: dict[str, Any] = {
        "target": target,
        "benchmark": {"name": benchmark, "prompts": len(rows), "max_new_tokens": max_new_tokens, "temperature": 0.0},
        "runs": runs,
        "comparisons": compare(rows, list(slots)),
        "lossless": all(run["lossless"] for run in runs.values()) and all(row["plain"]["identical"] for row in rows),
        "not_identical": [
            {"task_id": row["task_id"], "drafter": name}
            for row in rows
            for name, part in row["drafters"].items()
            if not part["identical"]
        ],
        "environment": {
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
            "cores": os.cpu_count(),
            "machine": platform.machine(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "specauf": __version__,
        },
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
    return record
