"""Targets of the hub are known by the commit that was loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch

from specauf.errors import UserError
from specauf.targets import TargetConfig, _commit, load_target, target_identity
from tests.builder.conftest import make_target, make_tokenizer, write_jsonl
from tests.builder.test_build import build, config


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache of a machine that is offline."""
    import huggingface_hub.constants
    import transformers.utils.hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    if hasattr(transformers.utils.hub, "TRANSFORMERS_CACHE"):  # of transformers 4, which reads the other one once
        monkeypatch.setattr(transformers.utils.hub, "TRANSFORMERS_CACHE", str(tmp_path / "hub"))
    _commit.cache_clear()
    return tmp_path / "hub"


def download(hub: Path, name: str, commit: str, seed: int) -> None:
    """As if a commit of `acme/NAME` had been downloaded, and `main` were there."""
    repository = hub / f"models--acme--{name}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs/main").write_text(commit)
    make_target(seed).save_pretrained(repository / "snapshots" / commit)
    make_tokenizer().save_pretrained(repository / "snapshots" / commit)


def test_a_hub_target_is_the_commit_that_was_loaded(hub: Path) -> None:
    config = TargetConfig(name="mine", model="acme/alpha", dtype="float32")
    download(hub, "alpha", "a" * 40, 0)
    first, _ = load_target(config)
    assert target_identity(config) == {"id": "acme/alpha", "revision": "a" * 40}
    download(hub, "alpha", "b" * 40, 1)
    again, _ = load_target(config)
    assert torch.equal(again.lm_head.weight, first.lm_head.weight), "one run sees one commit"
    _commit.cache_clear()  # as a new process begins
    moved, _ = load_target(config)
    assert target_identity(config)["revision"] == "b" * 40
    assert not torch.equal(moved.lm_head.weight, first.lm_head.weight)
    pinned = TargetConfig(name="mine", model="acme/alpha", dtype="float32", revision="a" * 40)
    assert torch.equal(load_target(pinned)[0].lm_head.weight, first.lm_head.weight)
    assert target_identity(pinned)["revision"] == "a" * 40


def test_a_build_of_one_hub_target_does_not_go_on_with_another(hub: Path, tmp_path: Path) -> None:
    for seed, name in enumerate(("alpha", "beta")):
        download(hub, name, name[0] * 40, seed)
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [{"prompt": f"question number {i}"} for i in range(40)])
    settings: dict[str, Any] = {"name": "mine", "dtype": "float32", "taps": (1, 3, 5), "mask_token": "<|mask|>"}
    one, other = (
        config(tmp_path, corpus, tmp_path / "cache", target=TargetConfig(model=f"acme/{name}", **settings))
        for name in ("alpha", "beta")
    )
    build(one)
    for name in ("manifest.json", "shard-00002.json"):  # as if it had been killed before
        (tmp_path / "cache" / name).unlink()
    with pytest.raises(UserError, match=r"acme/alpha.*acme/beta"):
        build(other)
    download(hub, "alpha", "c" * 40, 2)
    _commit.cache_clear()
    found = build(one)
    assert found is not None
    assert found.identity.target["revision"] == "a" * 40, "it goes on with what it was begun with"
