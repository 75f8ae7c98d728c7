"""Who may import whom: the arrows of the design, held for every file by its import statements."""

import ast
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ANYONE = {
    "errors",
    "progress",
    "configs",
    "command",
    "fingerprint",
    "linear",
    "rotary",
    "target_forward",
    "template_dates",
    "threads",
    "typed_json",
}  # leaves: they import nothing above them
# Each part of specauf, and the other parts it may import.
ARROWS = {
    "errors": set(),
    "progress": set(),
    "configs": set(),
    "command": set(),
    "fingerprint": set(),
    "linear": set(),
    "rotary": set(),
    "target_forward": set(),
    "template_dates": set(),
    "threads": set(),
    "typed_json": set(),
    "cache": set(),
    "data": {"cache", "module"},  # `module` for its type alone
    "objectives": {"data", "drafters"},
    "metrics": {"objectives"},
    "drafters": {"cache", "data", "checkpoint"},
    "decoding": {"data", "drafters"},
    "checkpoint": {"drafters", "export"},
    "export": {"cache", "checkpoint", "drafters", "targets"},
    "loading_errors": set(),
    "gguf_reading": set(),
    "targets": {"gguf_reading", "loading_errors"},
    "evaluation": {"cache", "checkpoint", "data", "decoding", "drafters", "objectives", "targets"},
    "optimizers": set(),
    "schedules": set(),
    "loggers": set(),
    "resume": set(),
    "other_cache": {"cache", "drafters"},
    "module": {
        "cache",
        "checkpoint",
        "data",
        "decoding",
        "drafters",
        "loggers",
        "metrics",
        "objectives",
        "other_cache",
        "resume",
        "schedules",
    },
    "callbacks": {"cache", "data"},
    "checkpoint_io": {"cache"},
    "ckpt_path": {"checkpoint"},
    "run_directory": {"callbacks", "cli"},
    "training_errors": {"callbacks", "drafters", "module"},
    "training_cli": {
        "callbacks",
        "checkpoint",
        "checkpoint_io",
        "ckpt_path",
        "data",
        "loggers",
        "module",
        "run_directory",
        "training_errors",
    },
    "sweep": {"cli"},
    "doctor": {"cache"},
    "sigterm": set(),
    "cli": {"sigterm"},
    "__main__": {"cli"},
}
# cache_builder stands on the contract of caches and on the target, and on nothing that trains.
BUILDER = {"cache", "sigterm", "targets"}
LINES = 350


def imports(file: Path) -> set[str]:
    """Dotted names a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module} if node.module != "specauf" else {f"specauf.{a.name}" for a in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def parts(package: str) -> dict[str, set[str]]:
    """Parts of a package with the parts of specauf, and the other packages, that they import."""
    found: dict[str, set[str]] = defaultdict(set)
    for file in (ROOT / package).rglob("*.py"):
        names = file.relative_to(ROOT / package).with_suffix("").parts
        mine = names[0]
        if mine == "__init__":
            continue
        for name in imports(file):
            top, _, rest = name.partition(".")
            if top == "specauf" and rest:
                found[mine].add(rest.split(".")[0])
            elif top in ("cache_builder", "studies", "benchmarks", "tests"):
                found[mine].add(top)
    return found


def test_specauf_imports_along_its_arrows():
    found = parts("specauf")
    assert set(ARROWS) >= set(found)
    wrong = {
        f"{part} -> {other}"
        for part, others in found.items()
        for other in others - {part, "__version__"} - ANYONE - ARROWS[part]
    }
    assert wrong == set()


def test_specauf_never_imports_the_builder():
    assert not any(others & {"cache_builder", "studies", "benchmarks", "tests"} for others in parts("specauf").values())


def test_the_builder_stands_on_caches_and_targets_alone():
    allowed = BUILDER | ANYONE | {"__version__", "cache_builder"}
    assert {o for others in parts("cache_builder").values() for o in others} <= allowed


@pytest.mark.parametrize("package", ["specauf/cache", "specauf/drafters", "specauf/objectives", "specauf/data"])
def test_no_model_of_transformers_on_the_training_path(package):
    for file in (ROOT / package).rglob("*.py"):
        assert not {name for name in imports(file) if name.startswith("transformers")}, file


def test_files_are_small():
    files = [
        f for p in ("specauf", "cache_builder", "studies", "benchmarks", "tests") for f in (ROOT / p).rglob("*.py")
    ]
    assert [str(f) for f in files if len(f.read_text().splitlines()) > LINES] == []
