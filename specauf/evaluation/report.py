"""A Markdown page and a plot from an evaluation record; reads JSON only."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def markdown(record: Mapping[str, Any], plot: str | None = None) -> str:
    """The record as one page.

    Args:
        record: of `evaluation_record`.
        plot: relative path of the PNG to show.
    """
    bench, runs = record["benchmark"], record["runs"]
    lines = [f"# {record['target']}: {bench['name']}, {bench['prompts']} prompts", ""]
    if "cache" in record:
        cache = record["cache"]
        lines += [
            f"Cache: {cache['tokens']:,} tokens in {cache['documents']:,} documents, "
            f"{cache['bytes_per_token']:,.0f} bytes a token, mean retained mass {cache['head_mass_mean']:.3f}.",
            "",
        ]
    lines += [
        "| drafter | emitted length, pooled (95 %) | per prompt | tokens/s | plain tokens/s | speed-up "
        "| drafting, verifying |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, run in runs.items():
        low, high = run["tau_pooled_95"]
        lines.append(
            f"| {name} | {run['tau_pooled']:.3f} ({low:.3f} to {high:.3f}) | {run['tau_per_prompt']:.3f} "
            f"| {run['tokens_per_second']:.1f} | {run['baseline_tokens_per_second']:.1f} | {run['speedup']:.2f} "
            f"| {run['draft_share']:.0%}, {run['verify_share']:.0%} |"
        )
    lines += [""]
    for pair, result in record["comparisons"].items():
        low, high = result["tau_ratio_95"]
        lines.append(
            f"Emitted length {pair.replace('/', ' over ')}: {result['tau_ratio'] - 1:+.1%} "
            f"(95 % {low - 1:+.1%} to {high - 1:+.1%}, paired over prompts)."
        )
    lines += ["", _lossless_line(record), ""]
    if plot:
        lines += [f"![emitted length and acceptance per slot]({plot})", ""]
    lines += ["Share of cycles that accept slot k:", "", *_slot_table(runs), ""]
    environment = ", ".join(f"{key} {value}" for key, value in record["environment"].items())
    lines += [f"Greedy decoding, at most {bench['max_new_tokens']} new tokens. {environment}.", ""]
    return "\n".join(lines)


def _lossless_line(record: Mapping[str, Any]) -> str:
    if record["lossless"]:
        return "Lossless: every answer equals `generate(do_sample=False)` token for token."
    worst = ", ".join(f"{item['task_id']} ({item['drafter']})" for item in record["not_identical"][:5])
    return f"NOT lossless: {len(record['not_identical'])} answers differ from `generate(do_sample=False)`: {worst}."


def _slot_table(runs: Mapping[str, Any]) -> list[str]:
    slots = max(len(run["accepted_per_slot"]) for run in runs.values())
    rows = ["| slot | " + " | ".join(str(k) for k in range(1, slots + 1)) + " |", "|---" * (slots + 1) + "|"]
    for name, run in runs.items():
        rows.append(f"| {name} | " + " | ".join(f"{share:.3f}" for share in run["accepted_per_slot"]) + " |")
    return rows


def plot(record: Mapping[str, Any], path: Path) -> None:
    """Write a PNG: emitted length with intervals, acceptance per slot, tokens per second."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = record["runs"]
    names = list(runs)
    colours = [f"C{i}" for i in range(len(names))]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for i, name in enumerate(names):
        tau, (low, high) = runs[name]["tau_pooled"], runs[name]["tau_pooled_95"]
        left.errorbar(i, tau, yerr=[[tau - low], [high - tau]], fmt="o", capsize=5, color=colours[i])
        left.annotate(f"{tau:.3f}", (i, tau), xytext=(8, 0), textcoords="offset points", va="center")
        share = runs[name]["accepted_per_slot"]
        middle.plot(range(1, len(share) + 1), share, marker="o", color=colours[i], label=name)
    left.set_xticks(range(len(names)), names)
    left.set_xlim(-0.6, len(names) - 0.4)
    left.set_title("emitted length (A + 1), pooled, 95 %")
    left.set_ylabel("tokens a cycle")
    middle.set_title("share of cycles that accept slot k")
    middle.set_xlabel("slot k")
    if any(share > 0 for run in runs.values() for share in run["accepted_per_slot"]):
        middle.set_yscale("log")
    middle.legend()
    first = runs[names[0]]
    speeds = {"generate": first["generate_tokens_per_second"], "plain": first["baseline_tokens_per_second"]}
    speeds |= {name: runs[name]["tokens_per_second"] for name in names}
    right.bar(list(speeds), list(speeds.values()), color=["0.6", "0.75", *colours])
    right.set_title("tokens per second")
    figure.suptitle(
        f"{record['target']}, {record['benchmark']['name']}, {record['benchmark']['prompts']} prompts, greedy"
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)
