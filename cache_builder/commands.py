"""The commands of `cache-builder`, from their words to what they print."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

from cache_builder.cli import COMMANDS
from cache_builder.config import BuildConfig
from specauf.cache.schema import FeatureKind
from specauf.command import CommandParser, beside_json, write_json
from specauf.configs import find_config, known_configs, require_yaml
from specauf.errors import UserError

_DEFAULTS = {"accelerator": "auto"}
_HELP = {
    "json": "also write the figures as JSON to this file; - for standard output",
    "sample": "documents to look at",
    "out": "directory of the smaller cache; required",
    "k": "log-probabilities a row; as many as there are when not given",
    "features": "kind of features; as they are when not given",
    "sketch_rank": "numbers a token of the sketch; as many as there are, or the hidden size, when not given",
    "compress_features": "compress the features' arrays, true or false; as they are when not given",
    "repair": "build damaged shards again, and remove what no record names",
    "accelerator": "where the target runs for --repair",
    "target.model": "for --repair: where the target is now, if it has moved",
    "corpus": "for --repair: where the corpus is now, if it has moved",
}


def parse_build(words: list[str], command: str = "build", **extra: Any) -> tuple[BuildConfig, dict[str, Any]]:
    """A build's settings from a command line, and the options of the command itself.

    Raises:
        UserError: an option is unknown, missing or of the wrong type.
    """
    from jsonargparse import ActionConfigFile

    parser = CommandParser(prog=f"cache-builder {command}", description=COMMANDS[command])
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file with any of the options; may be repeated")
    parser.add_class_arguments(BuildConfig)
    if command == "estimate":
        parser.set_defaults({"out": "caches/estimated"})  # only named, never written
    for name, kind in extra.items():
        parser.add_argument(f"--{name}", type=kind, default=None, help=_HELP[name])
    parsed = parser.instantiate(parser.parse_args(expand_names(words)))
    values = {f.name: parsed[f.name] for f in fields(BuildConfig)}
    return BuildConfig(**values), {name: parsed[name] for name in extra}


def expand_names(words: list[str], *, corpus_files: bool = True) -> list[str]:
    """Write options with underscores, and put shipped configs in the place of their bare names.

    `--config llama-3-8b` means the target's file; `--corpus NAME` the file of a corpus that has one.

    Args:
        words: of the command line.
        corpus_files: whether the command reads such files.

    Raises:
        UserError: no such target config.
    """
    out: list[str] = []
    for word in words:
        flag, sign, value = word.partition("=")
        if flag.startswith("--"):
            word = flag.replace("-", "_").replace("__", "--", 1) + sign + value
        out.append(word)
    for i, word in enumerate(out):
        flag, sign, value = word.partition("=")
        separate = not sign and flag in ("--config", "--corpus") and i + 1 < len(out)
        value = out[i + 1] if separate else value
        if flag == "--config" and value:
            file = value if Path(value).suffix in (".yaml", ".yml") else str(find_config("target", value))
            if not Path(file).is_file():
                raise UserError(f"config {file} does not exist: give a YAML file or one of {', '.join(_targets())}")
            require_yaml(Path(file))
        elif corpus_files and flag == "--corpus" and value in known_configs("corpus"):
            file, out[i] = str(find_config("corpus", value)), "--config" + ("" if separate else f"={value}")
        else:
            continue
        if separate:
            out[i + 1] = file
        else:
            out[i] = f"--config={file}"
    return out


def _targets() -> list[str]:
    return known_configs("target")


def _build(words: list[str]) -> None:
    config, own = parse_build(words, json=str)
    from cache_builder.driver import build
    from cache_builder.inspect import build_summary, figures

    manifest = build(config)
    if manifest is not None:
        print(build_summary(config.out, manifest), file=beside_json(own["json"]))
        write_json(own["json"], {"cache": config.out, **figures(manifest)})


def _estimate(words: list[str]) -> None:
    config, own = parse_build(words, "estimate", json=str, sample=int)
    from cache_builder.estimate import estimate

    report = estimate(config, own["sample"])
    if own["json"] != "-":
        print(report.text())
    write_json(own["json"], report.figures())


def _inspect(words: list[str]) -> None:
    place, own = _cache_and_options(words, "inspect", json=str, sample=int)
    from cache_builder.inspect import inspect

    quiet = own["json"] == "-"  # figures have no samples
    report = inspect(place, 0 if quiet else 1 if own["sample"] is None else own["sample"])
    if not quiet:
        print(report.text())
    write_json(own["json"], report.figures())


def _shrink(words: list[str]) -> None:
    place, own = _cache_and_options(
        words, "shrink", out=str, k=int, features=FeatureKind, sketch_rank=int, compress_features=bool | None, json=str
    )
    if own["out"] is None:
        raise UserError("out is not set: give --out, the directory of the smaller cache")
    from cache_builder.inspect import build_summary, figures
    from cache_builder.shrink import shrink

    manifest = shrink(
        place,
        own["out"],
        k=own["k"],
        features=own["features"],
        sketch_rank=own["sketch_rank"],
        compress_features=own["compress_features"],
    )
    print(build_summary(own["out"], manifest), file=beside_json(own["json"]))
    write_json(own["json"], {"cache": own["out"], **figures(manifest)})


def _verify(words: list[str]) -> None:
    options: dict[str, Any] = {"json": str, "repair": bool, "accelerator": Literal["auto", "cpu", "gpu"]}
    # By the names that a build gives them, for its messages name these.
    place, own = _cache_and_options(words, "verify", **options, **{"target.model": str, "corpus": str})
    from cache_builder.repair import check, repair

    if own["repair"]:
        verdict = repair(place, own["accelerator"], model=own["target.model"], corpus=own["corpus"])
    else:
        for flag in ("accelerator", "target.model", "corpus"):
            if own[flag] != _DEFAULTS.get(flag):
                raise UserError(f"--{flag} is given, but only a repair reads it: add --repair")
        verdict = check(place)
    if own["json"] != "-":
        print(verdict.text())
    write_json(own["json"], verdict.figures())
    if verdict.problems:
        hint = "delete or replace what is named" if own["repair"] else f"run cache-builder verify {place} --repair"
        count = len(verdict.problems)
        raise UserError(f"{place}: {count} problem{'s' if count > 1 else ''}: {hint}")


def _cache_and_options(words: list[str], command: str, **extra: Any) -> tuple[str, dict[str, Any]]:
    """The cache that a command is about, given first or as --cache, and the command's options."""
    parser = CommandParser(prog=f"cache-builder {command}", description=COMMANDS[command])
    parser.add_argument("--cache", type=str, required=True, help="directory or fsspec URL; may stand without --cache")
    for name, kind in extra.items():
        if kind is bool:
            parser.add_argument(f"--{name}", action="store_true", help=_HELP[name])
        else:
            parser.add_argument(f"--{name}", type=kind, default=_DEFAULTS.get(name), help=_HELP[name])
    words = expand_names(words, corpus_files=False)
    if words and not words[0].startswith("-"):
        words = [f"--cache={words[0]}", *words[1:]]
    parsed = parser.parse_args(words)
    return str(parsed.cache), {name: parsed[name] for name in extra}


RUN: dict[str, Callable[[list[str]], None]] = {
    "build": _build,
    "estimate": _estimate,
    "inspect": _inspect,
    "shrink": _shrink,
    "verify": _verify,
}
