"""`specauf export` and `specauf import`."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from specauf.cache import open_cache
from specauf.cache.location import Location, StoreError
from specauf.cache.reader import MANIFEST
from specauf.command import beside_json, run_function, write_json
from specauf.drafters import TargetVocabulary
from specauf.errors import UserError
from specauf.export.card import About, Layout
from specauf.export.check import check_directory
from specauf.export.directory import DTYPES, read_config, require_absent
from specauf.export.facts import TargetFacts
from specauf.export.source import Source, read_run_file, read_source, with_cache
from specauf.export.speculators import export_speculators
from specauf.export.zlab import export_zlab, servable


def export_command(
    source: Path | None = None,
    to: Layout = "zlab",
    out: Path | None = None,
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    cache: str | None = None,
    target: str | None = None,
    verifier: str | None = None,
    license: str | None = None,
    check: Path | None = None,
    push_to_hub: str | None = None,
    json: str | None = None,
) -> None:
    """Write a drafter as servers load it, or check a directory that is there.

    Args:
        source: run directory, checkpoint, or z-lab or speculators directory.
        to: layout to write; speculators' also holds the target's embedding and head.
        out: directory to write; must not exist.
        dtype: of the stored weights.
        cache: the cache the drafter was trained on; the one its run recorded when left out.
        target: the target's directory or config.json, or a name in configs/target, instead of a cache.
        verifier: hub id or directory that speculators and vLLM shall load the target from.
        license: of the drafter's weights, for the model card.
        check: check this directory and write nothing.
        push_to_hub: upload the export to this repository (OWNER/NAME).
        json: write what was found to this file too, or to standard output for -.
    """
    if check is not None:
        others = (source, out, verifier, license, push_to_hub)
        if any(value is not None for value in others) or (to, dtype) != ("zlab", "bfloat16"):
            raise UserError("check: goes with --cache, --target and --json only; leave out the others")
        # Speculators' layout alone holds the target's embedding and head.
        stored = "speculators_model_type" in read_config(check)
        _check(check, _facts(None, cache, target, weights=stored), json)
        return
    if source is None or out is None:
        raise UserError("source and --out are needed: specauf export RUN --to zlab --out DIR, or --check DIR")
    require_absent(out)
    if push_to_hub is not None:
        from specauf.export.hub import check_can_push

        check_can_push(push_to_hub)
    facts = _facts(source, cache, target, weights=to == "speculators")
    found = read_source(source, None if facts is None else facts.num_hidden_layers)
    servable(found.drafter, to)
    about = _about(found, source, cache, target, verifier, license)
    if to == "zlab":
        checked = export_zlab(found.drafter, out, dtype=DTYPES[dtype], target=facts, about=about)
    else:
        if facts is None:
            raise UserError(
                "embed_tokens: speculators' layout holds the target's embedding and head, neither the run's cache nor "
                "--cache or --target was found; give one"
            )
        verifier = verifier or (about.target if about.target_on_hub else None)
        checked = export_speculators(
            found.drafter, out, target=facts, verifier=verifier, dtype=DTYPES[dtype], about=about
        )
    known, say = "" if facts is None else f" against {facts.where}", beside_json(json)
    print(f"written {out} ({to}, {dtype}), checked{known}", file=say)
    if facts is None:
        note = "the target's config was not found, so rope, taps and vocabulary were not compared: give --cache"
        print(note, file=say)
    write_json(json, {"out": str(out), "layout": to, "dtype": dtype, "tensors": checked.tensors})
    if push_to_hub is not None:
        from specauf.export.hub import push

        print(f"uploaded {push(out, push_to_hub)}", file=say)


def import_command(
    source: Path,
    out: Path,
    cache: str | None = None,
    target: str | None = None,
    num_target_layers: int | None = None,
) -> None:
    """Turn a z-lab or speculators directory into one that fit, evaluate and audit read.

    Args:
        source: the directory.
        out: directory to write, in z-lab's layout and the source's precision; must not exist.
        cache: a cache of the drafter's target, to compare with.
        target: the target's directory or config.json, or a name in configs/target, instead of a cache.
        num_target_layers: depth of the target, which speculators' layout does not hold.
    """
    require_absent(out)
    facts = _facts(None, cache, target, weights=False)
    depth = num_target_layers if facts is None else facts.num_hidden_layers
    if facts is not None and num_target_layers not in (None, depth):
        raise UserError(f"num_target_layers: {num_target_layers} given, {depth} in {facts.where}: leave it out")
    found = read_source(source, depth)
    export_zlab(found.drafter, out, dtype=found.stored_dtype, target=facts, about=found.about)
    print(f"written {out}: use it with `specauf evaluate {out}`, or train on from it with --model.drafter.init={out}")


def _check(directory: Path, facts: TargetFacts | None, json: str | None) -> None:
    checked = check_directory(directory, facts)
    record = {
        "directory": str(directory),
        "layout": checked.layout,
        "tensors": checked.tensors,
        "target": None if facts is None else facts.where,
        "problems": [
            {"field": p.field, "found": str(p.found), "expected": str(p.expected), "why": p.why}
            for p in checked.problems
        ],
    }
    write_json(json, record)
    for problem in checked.problems:
        print(problem, file=beside_json(json))
    if checked.problems:
        more = f" (and {len(checked.problems) - 1} more, see above)" if len(checked.problems) > 1 else ""
        raise UserError(f"{directory}: {checked.problems[0]}{more}: export it again with `specauf export`")
    known = "its own config" if facts is None else facts.where
    sound = f"{directory}: sound ({checked.layout} layout, {checked.tensors} tensors, compared with {known})"
    print(sound, file=beside_json(json))


def _facts(source: Path | None, cache: str | None, target: str | None, *, weights: bool) -> TargetFacts | None:
    """What is known of the target: from what the user named, else from the cache that the run recorded."""
    if cache is not None and target is not None:
        raise UserError("cache and target: both given, one expected; the cache knows more")
    if cache is not None:
        return TargetFacts.from_cache(open_cache(cache), f"cache {cache}", weights=weights)
    if target is not None:
        return _target_facts(target, weights=weights)
    recorded = None if source is None else recorded_cache(source)
    if recorded is None:
        return None
    return TargetFacts.from_cache(open_cache(recorded), f"cache {recorded}", weights=weights)


def recorded_cache(source: Path) -> str | None:
    """The cache that a run directory recorded, if it is still where it was.

    Raises:
        UserError: its store does not answer.
    """
    for folder in (source, source.parent, source.parent.parent):
        if (folder / "run.json").is_file():
            url = read_run_file(folder / "run.json").get("cache")
            try:
                return url if isinstance(url, str) and Location(url).read(MANIFEST) else None
            except (FileNotFoundError, NotADirectoryError):
                return None
            except StoreError as error:
                raise UserError(
                    f"{error}, or give --target to export without the cache that the run recorded"
                ) from error
    return None


def _target_facts(target: str, *, weights: bool) -> TargetFacts:
    path = Path(target)
    if path.suffix == ".json" or (not weights and (path / "config.json").is_file()):
        return TargetFacts.from_file(path)
    from specauf.targets import load_target, resolve_target, target_model_config

    config = resolve_target(target)
    if not weights:
        found = target_model_config(config).to_dict()
        return TargetFacts.from_config(found, f"target {target}", dtype=getattr(torch, config.dtype))
    # The only use of a model here: a target that no cache describes has its embedding in its checkpoint alone.
    model, _ = load_target(config)
    vocabulary = TargetVocabulary.from_target(model)
    return TargetFacts.from_config(
        model.config.to_dict(), f"target {target}", vocab_size=vocabulary.vocab_size, vocabulary=vocabulary
    )


def _about(
    found: Source, source: Path, cache: str | None, target: str | None, verifier: str | None, license: str | None
) -> About:
    about = replace(found.about, license=license)
    if verifier is not None:
        about = _named(about, verifier)
    place = cache or (recorded_cache(source) if target is None else None)
    if place is not None:
        opened = open_cache(place)
        trained_on = about.made_from is None and found.fingerprint in (None, opened.fingerprint)
        about = with_cache(about, opened.manifest, trained_on=trained_on)
    elif about.target is None and target is not None:
        about = _named(about, target)
    return about


def _named(about: About, target: str) -> About:
    """Name the target in the card: a hub id as it is, of a local directory its last part alone."""
    if Path(target).exists():
        return replace(about, target=Path(target).resolve().name)
    return replace(about, target=target, target_on_hub=target.count("/") == 1)


def _flags(argv: list[str]) -> list[str]:
    """Options may be written with hyphens."""
    out = []
    for word in argv:
        flag, equals, value = word.partition("=")
        if flag.startswith("--"):
            flag = flag[:2] + flag[2:].replace("-", "_")
        out.append(f"{flag}{equals}{value}")
    return out


def export(argv: list[str]) -> None:
    """Parse and run `specauf export`."""
    run_function(export_command, _flags(argv), positional="source")


def import_(argv: list[str]) -> None:
    """Parse and run `specauf import`."""
    run_function(import_command, _flags(argv), positional="source")
