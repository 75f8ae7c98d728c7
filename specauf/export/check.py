"""Checks of an exported directory: every way known to lose acceptance silently in a server."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from specauf.drafters import DrafterConfig, zlab_class
from specauf.drafters.files import Weights, open_weights
from specauf.drafters.foreign import require_numbers, require_structure
from specauf.errors import UserError
from specauf.export import check_config
from specauf.export.directory import read_config
from specauf.export.facts import TargetFacts
from specauf.export.layout import Shapes, body_shapes, speculators_shapes
from specauf.export.problem import Problem

_FLOATS = ("BF16", "F16", "F32")
_TYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
# Names that other trainers give to the same tensors; servers would skip them and run random layers.
_FOREIGN = {
    "context_proj.weight": "fc.weight",
    "context_norm.weight": "hidden_norm.weight",
}


@dataclass(frozen=True)
class Checked:
    """What a check found.

    Attributes:
        layout: `zlab` or `speculators`.
        problems: in the order of the config, then of the tensors; empty when the directory is sound.
        tensors: how many there are.
    """

    layout: str
    problems: tuple[Problem, ...]
    tensors: int


def check_directory(directory: Path | str, target: TargetFacts | None = None) -> Checked:
    """Look for everything that a server would refuse, or load and run badly.

    Args:
        directory: z-lab's or speculators' layout.
        target: what is known of the target; its rope, vocabulary, taps, embedding and head are compared when given.

    Raises:
        UserError: there is nothing to check: config.json or the weights are missing or unreadable.
    """
    directory = Path(directory)
    raw = read_config(directory)
    require_structure(raw)
    require_numbers(raw)
    ours = "speculators_model_type" in raw
    problems = list((check_config.speculators if ours else check_config.zlab)(raw, target))
    if not ours and "auto_map" in raw and not (directory / "dflash.py").is_file():
        problems.append(Problem("auto_map", raw["auto_map"], "no entry", "it points at code that is not here"))
    if (directory / "mask_embedding.pt").exists():
        why = "vLLM puts it in the place of the target's mask row; remove it"
        problems.append(Problem("mask_embedding.pt", "a file", "no such file", why))
    with open_weights(directory) as weights:
        config = _shape_config(raw, ours)
        if config is not None:
            draft = raw.get("draft_vocab_size") if ours else None
            shapes = speculators_shapes(config, draft or config.vocab_size) if ours else body_shapes(config)
            problems += _names_and_shapes(weights, shapes)
        problems += _stored(weights, raw.get("dtype") or raw.get("torch_dtype"))
        if ours and config is not None:
            problems += _vocabulary(weights, config, target)
        return Checked("speculators" if ours else "zlab", tuple(problems), len(weights.names))


def require_sound(directory: Path, target: TargetFacts | None = None) -> Checked:
    """`check_directory`, which must find no problem.

    Raises:
        UserError: naming the first problem and how many there are.
    """
    checked = check_directory(directory, target)
    if checked.problems:
        raise UserError(f"export check: {checked.problems[0]} ({len(checked.problems)} problems in all)")
    return checked


def _shape_config(raw: dict[str, Any], ours: bool) -> DrafterConfig | None:
    """The numbers that decide the shapes; None when the config has none that make sense, which is reported already."""
    from specauf.export.speculators import to_zlab_config

    try:
        plain = to_zlab_config(raw, raw.get("num_target_layers") or 10**6) if ours else raw
        return zlab_class(plain).config_class.from_zlab(check_config.lenient(plain))
    except (UserError, TypeError):
        return None


def _names_and_shapes(weights: Weights, wanted: Shapes) -> list[Problem]:
    problems = []
    for name in sorted(set(wanted) - set(weights.names)):
        problems.append(Problem(name, "missing", f"shape {wanted[name]}", "servers run random numbers in its place"))
    for name in sorted(set(weights.names) - set(wanted)):
        meant = _FOREIGN.get(name) or (name.removeprefix("model.") if name.removeprefix("model.") in wanted else None)
        expected = f"{meant}, as this contract names it" if meant else "no such tensor"
        problems.append(Problem(name, f"shape {weights.shape(name)}", expected, "servers skip it without a word"))
    for name in sorted(set(wanted) & set(weights.names)):
        if weights.shape(name) != wanted[name]:
            problems.append(Problem(name, f"shape {weights.shape(name)}", f"{wanted[name]}", "the config says so"))
    return problems


def _stored(weights: Weights, said: Any) -> list[Problem]:
    """Types, metadata and finite numbers; one tensor in memory at a time."""
    problems = []
    floats = {weights.dtype(n) for n in weights.names if n not in ("d2t", "t2d")}
    if not floats <= set(_FLOATS):
        problems.append(Problem("dtype", ", ".join(sorted(floats)), ", ".join(_FLOATS), "servers load no other"))
    elif len(floats) > 1:
        problems.append(Problem("dtype", ", ".join(sorted(floats)), "one for all tensors", "loaders take the first"))
    elif floats and said != _TYPES[next(iter(floats))]:
        found = _TYPES[next(iter(floats))]
        problems.append(Problem("dtype", f"{said} in config.json", f"{found} as stored", "weights would be cast"))
    if weights.metadata.get("format") != "pt":
        problems.append(Problem("metadata", str(weights.metadata), "{'format': 'pt'}", "transformers refuses the file"))
    for name in weights.names:
        if weights.dtype(name) in _FLOATS and not torch.isfinite(weights[name]).all():
            why = "never filled from the target" if name in ("embed_tokens.weight", "lm_head.weight") else "broken"
            problems.append(Problem(name, "NaN or infinity", "finite numbers", why))
    return problems


def _vocabulary(weights: Weights, config: DrafterConfig, target: TargetFacts | None) -> list[Problem]:
    """Embedding, head and tables of speculators' layout against each other and against the target."""
    problems: list[Problem] = []
    names = set(weights.names)
    rows = None
    if {"d2t", "t2d"} <= names:
        d2t, t2d = weights["d2t"], weights["t2d"]
        if d2t.dtype != torch.int64 or t2d.dtype != torch.bool:
            return [Problem("d2t, t2d", f"{d2t.dtype}, {t2d.dtype}", "int64 and bool", "vLLM maps with them")]
        rows = d2t + torch.arange(len(d2t))
        inside = bool(((rows >= 0) & (rows < config.vocab_size)).all())
        if not inside or not bool((rows.diff() > 0).all()):
            why = "draft id i is target id i + d2t[i]"
            return [Problem("d2t", "ids, or offsets out of order", "offsets of ascending target ids", why)]
        marked = torch.zeros(config.vocab_size, dtype=torch.bool)
        marked[rows] = True
        if not torch.equal(marked, t2d):
            problems.append(Problem("t2d", f"{int(t2d.sum())} ids set", f"the {len(rows)} ids of d2t", "they differ"))
    if target is None or target.vocabulary is None or target.vocab_size != config.vocab_size:
        return problems
    expected = {"embed_tokens.weight": target.vocabulary.embedding, "lm_head.weight": target.vocabulary.head}
    for name, value in expected.items():
        if name not in names:
            continue
        found = weights[name]
        wanted = value if rows is None or name == "embed_tokens.weight" else value[rows]
        if found.shape == wanted.shape and not torch.equal(found, wanted.to(found.dtype)):
            problems.append(Problem(name, "other numbers", f"those of {target.where}", "it is another target's"))
    return problems
