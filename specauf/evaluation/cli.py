"""`specauf evaluate` and `specauf report`."""

import json
from pathlib import Path
from typing import Any

import torch

from specauf.cache import open_cache
from specauf.checkpoint import load_drafter
from specauf.command import run_function
from specauf.errors import UserError
from specauf.evaluation.benchmarks import load_benchmark
from specauf.evaluation.report import markdown, plot
from specauf.evaluation.results import evaluation_record
from specauf.evaluation.run import evaluate_prompts
from specauf.targets import load_target, resolve_target


def evaluate_command(
    drafters: list[str],
    target: str = "smollm2-135m",
    benchmark: str = "humaneval",
    limit: int | None = None,
    max_new_tokens: int = 128,
    cache: str | None = None,
    out: Path = Path("runs/evaluation"),
) -> None:
    """Decode a benchmark with the real target, with each drafter and without, and write OUT/evaluation.json.

    Args:
        drafters: run directories, checkpoints or z-lab directories; NAME=PATH to report one under another name.
        target: a config in configs/target, or a YAML file.
        benchmark: humaneval, or a JSONL file with a `turns` or `prompt` field.
        limit: decode the first so many prompts.
        max_new_tokens: length of an answer.
        cache: the cache the drafters were trained on, to describe it in the report.
        out: directory for evaluation.jsonl (a line a prompt, resumed) and evaluation.json.
    """
    named = dict(_named_path(text) for text in drafters)
    prompts = load_benchmark(benchmark, limit)
    manifest = open_cache(cache).manifest if cache else None
    loaded = {name: load_drafter(path).eval() for name, path in named.items()}
    model, tokenizer = load_target(resolve_target(target))
    for name, drafter in loaded.items():
        _check_fits(name, drafter, model)
    out.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode():
        rows = evaluate_prompts(
            model,
            tokenizer,
            loaded,
            prompts,
            max_new_tokens=max_new_tokens,
            rows_file=out / "evaluation.jsonl",
            settings={"target": target, "benchmark": benchmark},
        )
    slots = {name: drafter.config.block_size - 1 for name, drafter in loaded.items()}
    record = evaluation_record(
        rows[: len(prompts)], slots, manifest, target=target, benchmark=benchmark, max_new_tokens=max_new_tokens
    )
    (out / "evaluation.json").write_text(json.dumps(record, indent=2) + "\n")
    for name, run in record["runs"].items():
        print(
            f"{name}: emitted length {run['tau_pooled']:.3f} pooled, {run['tau_per_prompt']:.3f} per prompt; "
            f"{run['tokens_per_second']:.1f} tokens/s, plain {run['baseline_tokens_per_second']:.1f}"
        )
    print(f"lossless: {record['lossless']}; written {out}/evaluation.json")


def _named_path(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    return (name, Path(path)) if equals else (Path(text).name, Path(text))


def _check_fits(name: str, drafter: Any, model: Any) -> None:
    config, target = drafter.config, model.config
    for field, ours, theirs in (
        ("hidden_size", config.hidden_size, target.hidden_size),
        ("num_target_layers", config.num_target_layers, target.num_hidden_layers),
        ("vocab_size", config.vocab_size, target.vocab_size),
    ):
        if ours != theirs:
            raise UserError(
                f"drafter {name} was trained for a target with {field} {ours}, this target has {theirs}: "
                "give the target it was trained for with --target"
            )


def report_command(evaluation: Path, out: Path | None = None) -> None:
    """Write report.md, report.json and report.png from an evaluation.

    Args:
        evaluation: an evaluation.json, or the directory that holds it.
        out: where to write; beside the evaluation by default.
    """
    source = evaluation / "evaluation.json" if evaluation.is_dir() else evaluation
    if not source.is_file():
        raise UserError(f"{source} does not exist: run `specauf evaluate` first or name its evaluation.json")
    record = json.loads(source.read_text())
    directory = out or source.parent
    directory.mkdir(parents=True, exist_ok=True)
    plot(record, directory / "report.png")
    page = markdown(record, "report.png")
    (directory / "report.md").write_text(page)
    (directory / "report.json").write_text(json.dumps(record, indent=2) + "\n")
    print(page)
    print(f"written {directory}/report.md, report.json and report.png")


def evaluate(argv: list[str]) -> None:
    """Parse and run `specauf evaluate`."""
    run_function(evaluate_command, argv, positional="drafters")


def report(argv: list[str]) -> None:
    """Parse and run `specauf report`."""
    run_function(report_command, argv, positional="evaluation")
