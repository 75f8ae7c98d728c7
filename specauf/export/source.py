"""What an export starts from: the drafter, and what its run directory says of it."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from specauf.cache import Manifest
from specauf.checkpoint import (
    drafter_of,
    find_checkpoint,
    is_model_directory,
    known_digests,
    load_checkpoint,
    load_directory,
)
from specauf.drafters import Drafter
from specauf.drafters.files import open_weights
from specauf.errors import UserError
from specauf.export.card import About, describe_objective, tau_lines
from specauf.export.directory import common_dtype


@dataclass(frozen=True)
class Source:
    """A drafter with its history.

    Attributes:
        drafter: in fp32, servable.
        stored_dtype: of its weights on disk.
        about: for the model card.
        cache: URL of the cache it was trained on, as the run recorded it.
        fingerprint: of that cache.
    """

    drafter: Drafter
    stored_dtype: torch.dtype
    about: About
    cache: str | None = None
    fingerprint: str | None = None


def read_source(path: Path, num_target_layers: int | None = None) -> Source:
    """A run directory, a checkpoint, or a z-lab or speculators directory.

    Raises:
        UserError: nothing there is a drafter.
    """
    if is_model_directory(path):
        model = load_directory(path, num_target_layers)
        with open_weights(path) as weights:
            names = [name for name in model.state_dict() if name in weights.names]
            dtype = common_dtype({name: weights[name] for name in names})
        return Source(model, dtype, About(made_from=path.resolve().name))
    file = find_checkpoint(path)
    checkpoint = load_checkpoint(file)
    drafter = drafter_of(checkpoint, file)
    about = About(steps=checkpoint.get("global_step"))
    run = _run_directory(file)
    cache = None
    if run is not None:
        record = read_run_file(run / "run.json")
        cache = record.get("cache")
        about = replace(
            about,
            objective=_objective(run / "config.yaml"),
            measured=_measured(run, drafter, file),
            provenance=_provenance(record),
        )
    return Source(drafter, torch.float32, about, cache, checkpoint["specauf"].get("cache_fingerprint"))


def with_cache(about: About, manifest: Manifest, *, trained_on: bool = True) -> About:
    """Add what a cache says of the target, and of the corpus when the drafter was trained on it."""
    identity, counts = manifest.identity, manifest.counts
    name = identity.target.get("id")
    corpus = str(identity.corpus.get("name", "not named"))
    answers = "answered by the target" if identity.regeneration else "with its own answers"
    about = replace(
        about,
        target=about.target or name,
        target_on_hub=about.target_on_hub or (about.target is None and "revision" in identity.target),
    )
    if not trained_on:
        return about
    said = f"{corpus}, {answers}: {counts.documents:,} documents, {counts.supervised_tokens:,} supervised tokens"
    return replace(about, corpus=said)


def _run_directory(file: Path) -> Path | None:
    for folder in (file.parent, file.parent.parent):
        if (folder / "run.json").is_file():
            return folder
    return None


def read_run_file(path: Path) -> dict[str, Any]:
    """A JSON object that a run wrote.

    Raises:
        UserError: it is none.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not JSON ({error}); remove it to export without what it says") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: an object expected; remove it to export without what it says")
    return found


def _objective(path: Path) -> str | None:
    if not path.is_file():
        return None
    try:
        loss = yaml.safe_load(path.read_text())["model"]["loss"]
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(f"{path}: model.loss not found; remove it to export without what it says") from error
    return describe_objective(loss)


def _measured(run: Path, drafter: Drafter, checkpoint: Path) -> tuple[str, ...]:
    """Measurements of these very weights, beside the run or beside its sibling runs."""
    for folder in (run, run.resolve().parent):
        file = folder / "evaluation.json"
        if not file.is_file():
            continue
        record = read_run_file(file)
        try:
            known: dict[str, str] = record.get("drafters", {})
            own = known_digests(drafter, checkpoint)
            lines = tuple(line for name in known if known[name] in own for line in tau_lines(record, name, file))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{file}: not as `specauf evaluate` writes it ({error}); remove it to export without what it says"
            ) from error
        if lines:  # one beside the run may be of weights before
            return lines
    return ()


def _provenance(record: dict[str, Any]) -> dict[str, str]:
    versions = record.get("versions") or {}
    out = {}
    if versions.get("specauf"):
        out["specauf"] = f"{versions['specauf']}" + (f" at {record['git'][:12]}" if record.get("git") else "")
    if record.get("cache_fingerprint"):
        out["Cache fingerprint"] = f"`{record['cache_fingerprint'][:16]}`"
    if record.get("argv"):
        # Paths of the training machine stay there: only the options that shaped the run are told.
        words = [
            w for w in record["argv"][1:] if not any(p in w for p in ("default_root_dir", "data.cache", "ckpt_path"))
        ]
        out["Command"] = "`specauf " + " ".join(_short(w) for w in words) + "`"
    return out


def _short(word: str) -> str:
    flag, equals, value = word.partition("=")
    shown = Path(value).name if equals and "/" in value else value
    return f"{flag}{equals}{shown}" if equals else (Path(word).name if word.startswith("/") else word)
