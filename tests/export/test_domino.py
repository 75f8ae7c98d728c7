"""Domino drafters in z-lab's layout, which SGLang reads: what is written, what is refused, and back."""

import shutil
from pathlib import Path

import pytest
import torch

from specauf.checkpoint import load_directory
from specauf.cli import main
from specauf.drafters import DominoDrafter
from specauf.export import check_directory, export_zlab
from tests.drafters.tiny import tiny_drafter
from tests.export.conftest import BLOCK, MASK, TAPS, change, config, refused, tensors
from tests.export.test_check import Fault, drop, put, rename, spoil


@pytest.fixture(scope="session")
def domino(target) -> DominoDrafter:
    drafter = tiny_drafter("domino", target, taps=TAPS, mask_token_id=MASK, block_size=BLOCK)
    assert isinstance(drafter, DominoDrafter)
    return drafter


@pytest.fixture(scope="session")
def sound_domino(domino, facts, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "domino"
    export_zlab(domino, folder, dtype=torch.float32, target=facts)
    return folder


@pytest.fixture
def exported(sound_domino, tmp_path) -> Path:
    return Path(shutil.copytree(sound_domino, tmp_path / "domino"))


def test_an_export_is_what_sglang_reads(domino, exported):
    raw, shape = config(exported), domino.config
    assert raw["architectures"] == ["DFlashDraftModel"]
    wanted = {"projector_type": "domino", "shift_label": False, "pure_draft_prefix_len": 1}
    wanted |= {"gru_hidden_dim": shape.gru_hidden_dim, "emb_dim": shape.emb_dim}
    assert {name: raw["dflash_config"][name] for name in wanted} == wanted
    stored = tensors(exported)
    assert {n for n in stored if n.startswith(("prefix", "embed"))} == {
        "prefix_gru.weight_ih_l0",
        "prefix_gru.weight_hh_l0",
        "embed_proj.0.weight",
        "embed_proj.2.weight",
    }
    assert stored.keys() == domino.state_dict().keys()
    card = (exported / "README.md").read_text()
    assert "A Domino block drafter" in card
    assert "sglang.launch_server" in card
    for other in ("vllm serve", "llama-server", "from dflash"):
        assert other not in card


def test_it_is_read_back_and_exported_again_bit_for_bit(domino, exported, tmp_path):
    back = load_directory(exported)
    assert isinstance(back, DominoDrafter)
    assert back.config == domino.config
    for name, value in domino.state_dict().items():
        assert torch.equal(back.state_dict()[name], value)
    assert main(["import", str(exported), f"--out={tmp_path / 'again'}"]) == 0
    assert config(tmp_path / "again") == config(exported)
    assert (tmp_path / "again/model.safetensors").read_bytes() == (exported / "model.safetensors").read_bytes()


PREFIX = "dflash_config.pure_draft_prefix_len"
FAULTS = [
    Fault("shifted labels", "dflash_config.shift_label", put("dflash_config", "shift_label", to=True)),
    Fault("labels not said", "dflash_config.shift_label", drop("dflash_config", "shift_label")),
    Fault("another prefix", PREFIX, put("dflash_config", "pure_draft_prefix_len", to=2)),
    Fault("a prefix of True", PREFIX, put("dflash_config", "pure_draft_prefix_len", to=True)),
    Fault("no state", "dflash_config.gru_hidden_dim", drop("dflash_config", "gru_hidden_dim")),
    Fault("a rank that is no number", "dflash_config.emb_dim", put("dflash_config", "emb_dim", to="8")),
    Fault("another state", "prefix_gru.weight_hh_l0", put("dflash_config", "gru_hidden_dim", to=5)),
    Fault("another head", "dflash_config.projector_type", put("dflash_config", "projector_type", to="markov")),
    Fault("SpecForge's architecture", "architectures", put("architectures", to=["DominoDraftModel"])),
    Fault("no name of the head", "prefix_gru.weight_ih_l0", drop("dflash_config", "projector_type")),
    Fault("a head without its rows", "embed_proj.2.weight", lambda raw, weights: weights.pop("embed_proj.2.weight")),
    Fault("a misspelt head", "projection.0.weight", rename("embed_proj.0.weight", "projection.0.weight")),
    Fault("NaN", "prefix_gru.weight_hh_l0", spoil("prefix_gru.weight_hh_l0", lambda t: t * torch.nan)),
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_every_fault_of_the_head_is_named(exported, facts, fault: Fault, capsys):
    assert check_directory(exported, facts).problems == ()
    change(exported, fault.edit)
    assert fault.field in [problem.field for problem in check_directory(exported, facts).problems]
    refused(capsys, "export", "--check", exported)
