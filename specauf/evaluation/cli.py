"""`specauf evaluate`."""

import csv
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from specauf.cache import open_cache
from specauf.checkpoint import lacks_depth, load_drafter, weights_digest
from specauf.command import beside_json, run_function, write_json
from specauf.decoding.rules import Sampling
from specauf.drafters import Drafter
from specauf.errors import UserError
from specauf.evaluation.benchmarks import benchmark_name, load_benchmark
from specauf.evaluation.record import EVALUATION, save_record
from specauf.evaluation.results import evaluation_record
from specauf.evaluation.run import PLAIN, evaluate_prompts, without_processors
from specauf.evaluation.settings import distinct, make_settings
from specauf.linear import use_onednn
from specauf.targets import load_target, resolve_target, target_identity, target_model_config

CURVES = ("train/tau", "train/support_ratio", "train/support_accuracy", "train/token_accuracy", "val/tau")


def evaluate_command(
    drafters: list[str],
    target: str = "smollm2-135m",
    benchmarks: list[str] = ["humaneval"],  # noqa: B006  (read only, and shown by --help)
    limit: int | None = None,
    max_new_tokens: int = 128,
    temperatures: list[float] = [0.0],  # noqa: B006
    top_k: int | None = None,
    top_p: float | None = None,
    sampling: Sampling = "rejection",
    block_sizes: list[int | None] = [None],  # noqa: B006
    seed: int = 0,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    device: str = "auto",
    cache: str | None = None,
    out: Path = Path("runs/evaluation"),
    json: str | None = None,
) -> None:
    """Decode benchmarks with the real target, with each drafter and without, and write OUT/evaluation.json.

    Args:
        drafters: run directories, checkpoints, z-lab or speculators directories; NAME=PATH names one in the report.
        target: a config in configs/target, a YAML file, a model directory or a hub id.
        benchmarks: humaneval, gsm8k, math500, mbpp, mt-bench, alpaca; a JSONL or Parquet file with a `turns` or
            `prompt` field; NAME=FILE for one of these sets but humaneval from a file of its own rows.
        limit: decode the first so many prompts of each.
        max_new_tokens: length of an answer.
        temperatures: decode once at each; 0 is greedy.
        top_k: above temperature 0, sample among the k most probable tokens.
        top_p: above temperature 0, sample among the most probable tokens that hold this mass.
        sampling: rejection, or greedy-draft, which drafts the most probable tokens.
        block_sizes: decode once with each; null is the trained one.
        seed: of sampling.
        dtype: what the target computes in; its config's when not given.
        device: where to decode; auto takes a CUDA GPU where there is one, else the CPU.
        cache: the cache the drafters were trained on, to describe it in the report.
        out: directory for evaluation.jsonl (a line a prompt, resumed) and evaluation.json.
        json: write the record to this file too, or to standard output for -.
    """
    named = _named_paths(drafters)
    distinct("benchmarks", [benchmark_name(name) for name in benchmarks])
    prompts = {benchmark_name(name): load_benchmark(name, limit) for name in benchmarks}
    settings = make_settings(max_new_tokens, temperatures, block_sizes, top_k, top_p, sampling, seed)
    manifest = open_cache(cache).manifest if cache else None
    config = resolve_target(target)
    config = config if dtype is None else replace(config, dtype=dtype)
    depth = None
    if any(map(lacks_depth, named.values())):
        depth = target_model_config(config).get_text_config().num_hidden_layers
    loaded = {name: load_drafter(path, depth) for name, path in named.items()}
    digests = {name: weights_digest(drafter) for name, drafter in loaded.items()}  # before they change their type
    _check_blocks(loaded, block_sizes)
    out.mkdir(parents=True, exist_ok=True)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_target(config, device=device)
    if manifest is not None:
        text, rows_kept = model.config.get_text_config(), len(model.get_input_embeddings().weight)
        sizes = {"hidden_size": text.hidden_size, "num_target_layers": text.num_hidden_layers, "vocab_size": rows_kept}
        manifest.identity.require(str(cache), **sizes)
    left_out = without_processors(model)
    if left_out:
        note = f"note: {', '.join(left_out)} of the target's generation_config left out, of generate too"
        print(note, file=beside_json(json))
    for name, drafter in loaded.items():
        check_fits(name, drafter, model)
        use_onednn(drafter.to(device, getattr(torch, config.dtype)).requires_grad_(False))
    identity = target_identity(config)
    rows = evaluate_prompts(
        model,
        tokenizer,
        loaded,
        prompts,
        settings,
        rows_file=out / "evaluation.jsonl",
        identity={"target": identity, "dtype": config.dtype},
        template_options=config.template_options,
    )
    record = evaluation_record(
        rows,
        {name: drafter.config.slots for name, drafter in loaded.items()},
        manifest,
        target=target,
        identity=identity,
        dtype=config.dtype,
        drafters=digests,
        training={name: curves for name, path in named.items() if (curves := training_curves(path))},
    )
    save_record(record, out / EVALUATION)
    for part in record["parts"]:
        _print_part(part, json)
    print(f"lossless: {record['lossless']}; written {out}/{EVALUATION}", file=beside_json(json))
    write_json(json, record)


def _print_part(part: dict[str, Any], json: str | None) -> None:
    bench, to = part["benchmark"], beside_json(json)
    print(f"{bench['name']}, {bench['setting']}, {bench['prompts']} prompts", file=to)
    for name, run in part["runs"].items():
        print(
            f"  {name}: emitted length {run['tau_pooled']:.3f} pooled, {run['tau_per_prompt']:.3f} per prompt; "
            f"{run['tokens_per_second']:.1f} tokens/s, plain {run['baseline_tokens_per_second']:.1f}",
            file=to,
        )


def _named_paths(drafters: Sequence[str]) -> dict[str, Path]:
    if not drafters:
        raise UserError("drafters: none given, at least one expected: name run directories or drafter directories")
    named: dict[str, Path] = {}
    for text in drafters:
        name, equals, path = text.partition("=")
        plain = not equals or Path(text).exists()
        name, place = (Path(text).resolve().name, Path(text)) if plain else (name, Path(path))
        if name in (PLAIN, "generate"):
            raise UserError(f"drafters: {name} is what decoding without a drafter is called: give NAME={place}")
        if name in named:
            raise UserError(f"drafters: two are called {name}: give them names, NAME={place}")
        named[name] = place
    return named


def _check_blocks(drafters: dict[str, Drafter], block_sizes: Sequence[int | None]) -> None:
    for name, drafter in drafters.items():
        trained = drafter.config.block_size
        for block in block_sizes:
            if block is not None and not 2 <= block <= trained:
                raise UserError(f"block_sizes: {block} found, 2 to {trained} expected (drafter {name})")


def check_fits(name: str, drafter: Drafter, model: Any) -> None:
    """Refuse a drafter of another target.

    Raises:
        UserError: naming the field that differs, with both values.
    """
    config, target = drafter.config, model.config.get_text_config()
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


def training_curves(run: Path) -> dict[str, dict[str, list[float]]]:
    """What a run directory logged while training: `step` and `value` of each curve of the report."""
    # A resume moves the log of what was before to metrics-1.csv and so on; it may repeat some steps.
    before = sorted(run.glob("metrics-*.csv"), key=lambda file: (len(file.name), file.name))
    curves: dict[str, dict[float, float]] = {}
    for file in [*before, *run.glob("metrics.csv")]:
        with file.open(newline="") as lines:
            for row in csv.DictReader(lines):
                for name in CURVES:
                    step, value = _number(row.get("step")), _number(row.get(name))
                    if step is not None and value is not None:
                        curves.setdefault(name, {})[step] = value
    points = {name: sorted(curve.items()) for name, curve in curves.items()}
    return {
        name: dict(zip(("step", "value"), map(list, zip(*p, strict=True)), strict=True)) for name, p in points.items()
    }


def _number(text: str | None) -> float | None:
    """What a cell of a log holds; None for an empty one, for NaN, and where a killed run left half a number."""
    try:
        value = float(text or "nan")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def evaluate(argv: list[str]) -> None:
    """Parse and run `specauf evaluate`."""
    run_function(evaluate_command, argv, positional="drafters")
