"""A Markdown page from an evaluation record; reads JSON only."""

from collections.abc import Mapping
from typing import Any

Record = Mapping[str, Any]


def markdown(record: Record, plot: str | None = None) -> str:
    """The record as one page.

    Args:
        record: of `evaluation_record` or of `join`.
        plot: relative path of the PNG to show.
    """
    lines = [f"# {title(record)}", ""]
    if "cache" in record:
        lines += [cache_line(record), ""]
    for part in record["parts"]:
        bench = part["benchmark"]
        lines += [f"## {bench['name']}, {bench['setting']}, {prompt_count(bench)}", ""]
        lines += [*table(*runs_table(part["runs"])), ""]
        lines += [line for pair in comparison_lines(part) for line in (pair, "")]
        if plot and part is record["parts"][0]:
            lines += [f"![emitted length, acceptance per slot, speed]({plot})", ""]
        lines += ["Share of cycles that accept slot k:", "", *table(*slot_table(part["runs"])), ""]
    lines += [*lossless_lines(record), ""]
    lines += [footer(record), ""]
    return "\n".join(lines)


def title(record: Record) -> str:
    """Headline: target and drafters."""
    return f"{record['target']}: {', '.join(record['runs'])}"


def cache_line(record: Record) -> str:
    """The cache in a sentence."""
    cache = record["cache"]
    return (
        f"Cache: {cache['tokens']:,} tokens in {cache['documents']:,} documents, "
        f"{cache['bytes_per_token']:,.0f} bytes a token, mean retained mass {cache['head_mass_mean']:.3f}."
    )


def runs_table(runs: Record) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the main table; times are milliseconds a token."""
    header = [
        "drafter",
        "emitted length, pooled (95 %)",
        "mean of prompts' means",
        "tokens/s",
        "plain tokens/s",
        "speed-up (95 %)",
        "over generate",
        "ms a token: drafting, verifying, rest",
    ]
    rows = []
    for name, run in runs.items():
        time = run["milliseconds_per_token"]
        rows.append(
            [
                name,
                f"{run['tau_pooled']:.3f} ({interval(run, 'tau_pooled_95', 3)})",
                f"{run['tau_per_prompt']:.3f}",
                f"{run['tokens_per_second']:.1f}",
                f"{run['baseline_tokens_per_second']:.1f}",
                f"{run['speedup']:.2f} ({interval(run, 'speedup_95', 2)})",
                f"{run['speedup_over_generate']:.2f}",
                f"{time['draft']:.1f}, {time['verify']:.1f}, {time['prefill'] + time['other']:.1f}",
            ]
        )
    return header, rows


def interval(run: Record, field: str, digits: int) -> str:
    """A run's interval in words: one prompt, drawn again and again, has no spread to tell."""
    low, high = run[field]
    one = sum(cycles > 0 for cycles in run["by_prompt"]["cycles"]) == 1
    return "one prompt, no interval" if one else f"{low:.{digits}f} to {high:.{digits}f}"


def slot_table(runs: Record) -> tuple[list[str], list[list[str]]]:
    """Header and rows of survival per slot."""
    slots = max(len(run["accepted_per_slot"]) for run in runs.values())
    rows = []
    for name, run in runs.items():
        shares = [f"{share:.3f}" for share in run["accepted_per_slot"]]
        rows.append([name, *shares, *[""] * (slots - len(shares))])
    return ["slot", *map(str, range(1, slots + 1))], rows


def comparison_lines(part: Record) -> list[str]:
    """One sentence a pair of runs of one benchmark and setting."""
    lines = []
    *names, base = part["runs"]
    for name in names:
        result = part["comparisons"].get(f"{name}/{base}")
        if result is None:
            continue
        low, high = result["tau_ratio_95"]
        one = result["prompts"] == 1
        spread = "one prompt, no interval" if one else f"95 % {low - 1:+.1%} to {high - 1:+.1%}"
        paired = "" if one else f", paired over {result['prompts']} prompts"
        lines.append(
            f"Emitted length {name} over {base}: {result['tau_ratio'] - 1:+.1%} ({spread}{paired}{_laid_out(result)})."
        )
    return lines


def _laid_out(result: Record) -> str:
    """What a pair of evaluations made apart may hide: the template's date or options."""
    others = result.get("other_tokens")
    return f", {others} laid out otherwise, as with another date or other template_options" if others else ""


def lossless_lines(record: Record) -> list[str]:
    """Whether greedy output was that of `generate`, and every place where it was not."""
    if record["lossless"] is None:
        return ["Sampled decoding only: output has the target's distribution, not its one answer."]
    if record["lossless"]:
        return ["Lossless: every greedy answer equals `generate(do_sample=False)` token for token."]
    found = record["divergences"]
    near = sum(d["near_tie"] for d in found)
    lines = [
        f"NOT token-identical: {len(found)} answers differ from `generate(do_sample=False)`, {near} of them at a "
        f"near-tie of the target ({record['dtype']}):",
        "",
    ]
    for d in found:
        gap = "one answer is longer" if d["logit_gap"] is None else f"logit gap {d['logit_gap']:.2g}"
        kind = "near-tie" if d["near_tie"] else "NO near-tie"
        lines.append(f"- {d['task_id']}, {d['decoder']}: token {d['position']}, {gap}, {kind}")
    return lines


def footer(record: Record) -> str:
    """How it was measured."""
    settings = sorted({part["benchmark"]["max_new_tokens"] for part in record["parts"]})
    environment = ", ".join(f"{key} {value}" for key, value in record["environment"].items())
    return (
        f"At most {', '.join(map(str, settings))} new tokens, one prompt at a time, {record['dtype']}. {environment}."
    )


def prompt_count(bench: Record) -> str:
    """How many prompts a benchmark's runs decoded; joined evaluations may differ."""
    fewest, most = bench.get("fewest_prompts", bench["prompts"]), bench["prompts"]
    return f"{most} prompt{'s' * (most > 1)}" if fewest == most else f"{fewest} to {most} prompts"


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table."""
    # A name may hold what would end its cell or its row.
    plain = [[" ".join(cell.split()).replace("|", "\\|") for cell in cells] for cells in (header, *rows)]
    lines = ["| " + " | ".join(cells) + " |" for cells in plain]
    return [lines[0], "|---" * len(header) + "|", *lines[1:]]
