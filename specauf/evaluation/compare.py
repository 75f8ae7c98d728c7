"""Comparing runs: on the same prompts, in pairs, with the interval of the ratio; and joining several evaluations."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from specauf.errors import UserError
from specauf.evaluation.summary import bootstrap_paired
from specauf.fingerprint import comparable


def compare(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Ratio of pooled tau of each run to the last named one, over the prompts both decoded.

    Args:
        runs: of one benchmark and setting, with their `by_prompt` sums.

    Returns:
        By "first/last": `tau_ratio`, `tau_ratio_95` (prompts resampled as pairs), `prompts`, how many they share, and
        `other_tokens`, how many of them were laid out otherwise around the same text (None: not known). Prompts for
        which either drafted nothing are left out.
    """
    *names, base = runs
    found = {f"{name}/{base}": _ratio(runs[name]["by_prompt"], runs[base]["by_prompt"]) for name in names}
    return {pair: ratio for pair, ratio in found.items() if ratio is not None}


def _ratio(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any] | None:
    at = {prompt: i for i, prompt in enumerate(_prompts(second)) if second["cycles"][i]}
    pairs = [(i, at[prompt]) for i, prompt in enumerate(_prompts(first)) if prompt in at and first["cycles"][i]]
    if not pairs:
        return None
    one, two = ([pair[side] for pair in pairs] for side in (0, 1))
    sums, cycles = (np.array(first[k], float)[one] for k in ("accepted", "cycles"))
    base_sums, base_cycles = (np.array(second[k], float)[two] for k in ("accepted", "cycles"))
    known = "ids" in first and "ids" in second
    return {
        "tau_ratio": float((sums.sum() / cycles.sum() + 1) / (base_sums.sum() / base_cycles.sum() + 1)),
        "tau_ratio_95": bootstrap_paired(sums, cycles, base_sums, base_cycles, plus=1.0),
        "prompts": len(pairs),
        "other_tokens": sum(first["ids"][i] != second["ids"][j] for i, j in pairs) if known else None,
    }


def _prompts(sums: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Prompts by name and text: files of one name need not hold the same."""
    return list(zip(sums["task_id"], sums["digest"], strict=True))


def join(records: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """One record of several evaluations: runs of the same benchmark and setting stand side by side.

    Args:
        records: evaluation records by the label that tells runs of the same name apart.

    Raises:
        UserError: they were not measured alike: of different targets, in different precision or length, or elsewhere.
    """
    labels = list(records)
    first = records[labels[0]]
    if len(records) == 1:
        return dict(first)
    for label, record in records.items():
        if "identity" in first and "identity" in record:
            one, two = comparable(first["identity"], record["identity"])
            _require_same("identity", one, labels[0], two, label)
        else:  # one target may have been given by several words; early records hold nothing else
            _require_same("target", first["target"], labels[0], record["target"], label)
        _require_same("dtype", first["dtype"], labels[0], record["dtype"], label)
        places = first["environment"], record["environment"]
        _require_same("device", places[0]["device"], labels[0], places[1]["device"], label)
    names = [name for record in records.values() for name in record["runs"]]
    parts: dict[tuple[str, str], dict[str, Any]] = {}
    seen: dict[tuple[str, str], str] = {}
    training: dict[str, Any] = {}
    drafters: dict[str, Any] = {}
    for label, record in records.items():
        own = {name: name if names.count(name) == 1 else f"{label}/{name}" for name in record["runs"]}
        training |= {own[name]: curve for name, curve in record.get("training", {}).items()}
        drafters |= {own[name]: digest for name, digest in record.get("drafters", {}).items()}
        for part in record["parts"]:
            bench = part["benchmark"]
            key = bench["name"], bench["setting"]
            joint = parts.setdefault(key, {"benchmark": dict(bench), "runs": {}, "divergences": []})
            idle = {"seed", "sampling"} if bench["temperature"] == 0 else set()
            for field in sorted((joint["benchmark"].keys() | bench.keys()) - {"prompts", "fewest_prompts"} - idle):
                values = joint["benchmark"].get(field), bench.get(field)
                _require_same(field, values[0], seen.setdefault(key, label), values[1], label)
            joint["runs"] |= {own[name]: run for name, run in part["runs"].items()}
            here, fewest = joint["benchmark"], min(map(_fewest, (joint["benchmark"], bench)))
            here |= {"prompts": max(here["prompts"], bench["prompts"]), "fewest_prompts": fewest}
            if "lossless" in part:
                joint["lossless"] = joint.get("lossless", True) and part["lossless"]
                found = part.get("divergences", [])
                joint["divergences"] += [d | {"decoder": own.get(d["decoder"], d["decoder"])} for d in found]
    joined = [part | {"comparisons": compare(part["runs"])} for part in parts.values()]
    common = {key: v for key, v in first.items() if all(key in r and r[key] == v for r in records.values())}
    return {
        "target": first["target"],
        **{key: common[key] for key in ("format", "identity", "dtype", "corpus", "cache") if key in common},
        "drafters": drafters,
        **{key: joined[0][key] for key in ("benchmark", "runs", "comparisons")},
        "lossless": _all([record["lossless"] for record in records.values()]),
        "divergences": [d for part in joined for d in part["divergences"]],
        "parts": joined,
        "training": training,
        "environment": united([record["environment"] for record in records.values()]),
    }


def united(environments: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One for several: what differs is named after one another, in order."""
    fields = dict.fromkeys(field for found in environments for field in found)
    values = {field: {str(found[field]): found[field] for found in environments if field in found} for field in fields}
    return {field: next(iter(v.values())) if len(v) == 1 else " and ".join(v) for field, v in values.items()}


def _fewest(bench: dict[str, Any]) -> int:
    return int(bench.get("fewest_prompts", bench["prompts"]))


def _require_same(field: str, one: Any, first: str, two: Any, second: str) -> None:
    if one != two:
        raise UserError(f"{field}: {one} in {first}, {two} in {second}; report runs of one {field} together")


def _all(values: Sequence[bool | None]) -> bool | None:
    known = [value for value in values if value is not None]
    return all(known) if known else None
