"""What a study runs: a YAML file of caches, groups of trainings, and how their drafters are decoded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from specauf.errors import UserError

FOLDER = Path(__file__).parent
AMOUNTS = {"steps": "training steps", "bytes": "cache, MB"}


@dataclass(frozen=True)
class CachePlan:
    """A cache to build, if it is not there.

    Attributes:
        out: its directory; studies may share one.
        options: of `cache-builder build`, or of `cache-builder shrink`.
        source: name of the cache, earlier in the file, that it is shrunk from; None to build it.
    """

    out: Path
    options: list[str] = field(default_factory=list)
    source: str | None = None

    def command(self, caches: "Mapping[str, CachePlan]") -> list[str]:
        """What makes it, without the interpreter."""
        words = ["build"] if self.source is None else ["shrink", str(caches[self.source].out)]
        return ["cache_builder", *words, *self.options, f"--out={self.out}"]


@dataclass(frozen=True)
class Group:
    """Trainings that differ in loss and seed alone: the same cache, initial weights and batches for each seed.

    Attributes:
        name: of the group.
        cache: name of a cache of the study.
        losses: files in configs/loss/.
        seeds: of weights, order and anchors.
        drafter: file in configs/drafter/.
        options: of `specauf fit`, the same for all.
        base: the loss that the others are compared with.
        note: one line for the table.
    """

    name: str
    cache: str
    losses: list[str]
    seeds: list[int]
    drafter: str = "dflash"
    options: list[str] = field(default_factory=list)
    base: str = "decay"
    note: str = ""


@dataclass(frozen=True)
class Curve:
    """A picture of tau against what trainings had of something.

    Attributes:
        file: its name.
        of: "group/loss", the trainings in it.
        x: `steps` of training, or `bytes` of the cache.
    """

    file: str
    of: list[str]
    x: str

    @property
    def label(self) -> str:
        """Under the axis."""
        return AMOUNTS[self.x]

    def points(self, records: Sequence[dict[str, Any]]) -> list[tuple[str, float, list[dict[str, Any]]]]:
        """Each "group/loss" that was trained, how much it had, and its records; in the order of the amount.

        Trainings of a group have the same; records from before the size was written down take it from the others.
        """
        found = []
        for name in self.of:
            mine = [r for r in records if f"{r['group']}/{r['loss']}" == name]
            sizes = [r["cache"]["bytes"] / 1e6 for r in mine if "cache" in r]
            amounts = [float(r["training"]["steps"]) for r in mine] if self.x == "steps" else sizes
            if amounts:
                found.append((name, amounts[0], mine))
        return sorted(found, key=lambda point: point[1])


@dataclass(frozen=True)
class Decoding:
    """How every drafter is decoded, greedily, with the real target.

    Attributes:
        benchmarks: names of `specauf evaluate`; more are added by --also.
        limit: prompts of each.
        max_new_tokens: of each answer.
        batch_size: prompts decoded together.
    """

    benchmarks: list[str]
    limit: int
    max_new_tokens: int
    batch_size: int = 16


@dataclass(frozen=True)
class Study:
    """One YAML file.

    Attributes:
        name: of the file.
        target: name in configs/target/.
        caches: by name.
        groups: in the order they run; one name may stand several times, with other losses or seeds.
        decoding: the same for all.
        comparisons: pairs of "group/loss", compared on the seeds both have.
        curves: pictures of tau against steps or bytes.
    """

    name: str
    target: str
    caches: dict[str, CachePlan]
    groups: list[Group]
    decoding: Decoding
    comparisons: list[tuple[str, str]] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)

    def merged(self) -> list[Group]:
        """One group a name, with the losses and seeds of all that share it."""
        found: dict[str, Group] = {}
        for group in self.groups:
            first = found.setdefault(group.name, replace(group, losses=[], seeds=[]))
            first.losses.extend(loss for loss in group.losses if loss not in first.losses)
            first.seeds.extend(seed for seed in group.seeds if seed not in first.seeds)
        return list(found.values())


def read_study(name: str) -> Study:
    """The study of `studies/NAME.yaml`, or of a path to a YAML file.

    Raises:
        UserError: the file is missing, or a field is unknown, missing or names what is not there.
    """
    file = Path(name) if name.endswith(".yaml") else FOLDER / f"{name}.yaml"
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in FOLDER.glob("*.yaml")))
        raise UserError(f"study {name!r} is unknown: give one of {known}, or a YAML file")
    try:
        raw = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{file}: give a mapping with target, caches, groups and decoding")
    shared = raw.pop("cache_common", [])
    caches = {key: _made(CachePlan, value, f"{file} caches.{key}") for key, value in raw.pop("caches", {}).items()}
    caches = {
        key: replace(cache, out=Path(cache.out), options=shared * (cache.source is None) + cache.options)
        for key, cache in caches.items()
    }
    common = raw.pop("common", [])
    groups = [_made(Group, value, f"{file} groups[{i}]") for i, value in enumerate(raw.pop("groups", []))]
    groups = [replace(group, options=common + group.options) for group in groups]
    decoding = _made(Decoding, raw.pop("decoding", {}), f"{file} decoding")
    raw["curves"] = [_made(Curve, value, f"{file} curves[{i}]") for i, value in enumerate(raw.get("curves", []))]
    study = _made(Study, raw | {"name": file.stem, "caches": caches, "groups": groups, "decoding": decoding}, str(file))
    for name, cache in caches.items():
        earlier = list(caches)[: list(caches).index(name)]
        if cache.source is not None and cache.source not in earlier:
            raise UserError(
                f"{file}: cache {name} is shrunk from {cache.source!r}, known before it: {', '.join(earlier)}"
            )
    for group in groups:
        if group.cache not in caches:
            raise UserError(
                f"{file}: group {group.name} names the cache {group.cache!r}, known are {', '.join(caches)}"
            )
    trained = {f"{group.name}/{loss}" for group in groups for loss in group.losses}
    for group in groups:
        if f"{group.name}/{group.base}" not in trained:
            raise UserError(f"{file}: group {group.name} compares with {group.base!r}, which it does not train")
    for curve in study.curves:
        if curve.x not in AMOUNTS:
            raise UserError(f"{file}: curve {curve.file} has x {curve.x!r}: give one of {', '.join(AMOUNTS)}")
    named = [*study.comparisons, *(curve.of for curve in study.curves)]
    for name in (name for names in named for name in names):
        if name not in trained:
            raise UserError(
                f"{file}: comparisons and curves: {name!r} found, one of {', '.join(sorted(trained))} expected"
            )
    return study


def _made(kind: Any, values: Any, where: str) -> Any:
    known = {f.name for f in fields(kind)}
    wrong = sorted(set(values) - known) if isinstance(values, dict) else [repr(values)]
    if wrong:
        raise UserError(f"{where}: {', '.join(wrong)} found, {', '.join(sorted(known))} expected")
    try:
        return kind(**values)
    except TypeError as error:
        raise UserError(f"{where}: {error}") from error
