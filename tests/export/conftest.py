"""A tiny target with a random drafter, exported once in each layout; tests copy a directory before they break it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from specauf.checkpoint import load_directory
from specauf.cli import main
from specauf.drafters import DFlashDrafter, TargetVocabulary
from specauf.export import TargetFacts, export_speculators, export_zlab
from tests.builder.conftest import make_target
from tests.drafters.tiny import tiny_dflash
from tests.training.conftest import (
    tiny_cache,  # noqa: F401  (a fixture)
    write_tiny_cache,
)
from tests.training.running import fit

TAPS, MASK, BLOCK = (1, 3, 5), 258, 6
GOLDEN = Path(__file__).parent / "golden"


def golden(name: str) -> Any:
    return json.loads((GOLDEN / name).read_text())


def tensors(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "model.safetensors")


def config(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())


def change(directory: Path, edit: Callable[[dict[str, Any], dict[str, Tensor]], object], **metadata: str) -> Path:
    """Let `edit` spoil config and tensors of a directory."""
    raw, weights = config(directory), tensors(directory)
    edit(raw, weights)
    (directory / "config.json").write_text(json.dumps(raw))
    save_file(weights, directory / "model.safetensors", metadata=metadata or {"format": "pt"})
    return directory


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    """Equal names, types, shapes and bytes (NaN or -0.0 included)."""
    return found.keys() == wanted.keys() and all(
        found[n].dtype == wanted[n].dtype
        and found[n].shape == wanted[n].shape
        and found[n].contiguous().view(torch.uint8).equal(wanted[n].contiguous().view(torch.uint8))
        for n in wanted
    )


def expect_a_round_trip(drafter: DFlashDrafter, exported: Path, zlab: Path, facts: TargetFacts, folder: Path) -> None:
    """An export is read back, imported and exported again in both layouts without a change."""
    back = load_directory(exported)
    assert type(back) is type(drafter)
    assert back.config == drafter.config
    assert same(dict(back.state_dict()), dict(drafter.state_dict()))
    assert main(["import", str(exported), f"--out={folder / 'again'}"]) == 0
    assert config(folder / "again") == config(zlab)
    assert (folder / "again/model.safetensors").read_bytes() == (zlab / "model.safetensors").read_bytes()
    again, speculators = load_directory(folder / "again"), zlab.with_name("speculators")
    export_speculators(again, folder / "s", dtype=torch.float32, target=facts, verifier="owner/tiny")
    assert config(folder / "s") == config(speculators)
    assert same(tensors(folder / "s"), tensors(speculators))


@pytest.fixture(scope="session")
def target() -> Any:
    return make_target()


@pytest.fixture(scope="session")
def vocabulary(target) -> TargetVocabulary:
    return TargetVocabulary.from_target(target)


@pytest.fixture(scope="session")
def facts(target, vocabulary) -> TargetFacts:
    return TargetFacts.from_config(
        target.config.to_dict(), "the tiny target", taps=TAPS, mask_token_id=MASK, vocabulary=vocabulary
    )


@pytest.fixture(scope="session")
def drafter(target) -> DFlashDrafter:
    torch.manual_seed(0)
    return tiny_dflash(target, taps=TAPS, mask_token_id=MASK, block_size=BLOCK)


@pytest.fixture(scope="session")
def sound_zlab(drafter, facts, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "zlab"
    export_zlab(drafter, folder, target=facts)
    return folder


@pytest.fixture(scope="session")
def sound_speculators(drafter, facts, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "speculators"
    export_speculators(drafter, folder, target=facts, verifier="owner/tiny")
    return folder


@pytest.fixture
def zlab(sound_zlab, tmp_path) -> Path:
    return Path(shutil.copytree(sound_zlab, tmp_path / "zlab"))


@pytest.fixture
def speculators(sound_speculators, tmp_path) -> Path:
    return Path(shutil.copytree(sound_speculators, tmp_path / "speculators"))


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    """On a sketch, so that what is exported had to be folded."""
    return write_tiny_cache(tmp_path_factory.mktemp("cache") / "cache", features="sketch", sketch_rank=24)


@pytest.fixture(scope="session")
def trained(cache, tmp_path_factory) -> Path:
    """By a process of its own, whose words are those of the run."""
    folder = tmp_path_factory.mktemp("runs") / "auf"
    done = fit(cache, folder, "--model.loss=auf", "--trainer.max_steps=2")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(trained, tmp_path / "auf"))


def refused(capsys, *words: object) -> str:
    """The one line that a command ends with."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err
