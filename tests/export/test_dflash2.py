"""DFlash 2 drafters in both layouts: what is written, what is refused, and back."""

import shutil
from pathlib import Path

import pytest
import torch

from specauf.drafters import DFlash2Drafter
from specauf.errors import UserError
from specauf.export import check_directory, export_speculators, export_zlab
from tests.drafters.tiny import tiny_drafter
from tests.export.conftest import BLOCK, MASK, TAPS, change, config, expect_a_round_trip, golden, refused, same, tensors
from tests.export.test_check import Fault, all_of, drop, put, rename, spoil

OWN = ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k")
LAYOUTS = ("zlab", "speculators")


@pytest.fixture(scope="session")
def dflash2(target) -> DFlash2Drafter:
    drafter = tiny_drafter("dflash2", target, taps=TAPS, mask_token_id=MASK, block_size=BLOCK)
    assert isinstance(drafter, DFlash2Drafter)
    return drafter


@pytest.fixture(scope="session")
def sound(dflash2, facts, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sound")
    export_zlab(dflash2, folder / "zlab", dtype=torch.float32, target=facts)
    out = folder / "speculators"
    export_speculators(dflash2, out, dtype=torch.float32, target=facts, verifier="owner/tiny")
    return {layout: folder / layout for layout in LAYOUTS}


@pytest.fixture
def exported(sound, tmp_path) -> dict[str, Path]:
    return {layout: Path(shutil.copytree(sound[layout], tmp_path / layout)) for layout in LAYOUTS}


def test_zlab_layout_is_that_of_dflash_with_its_own_fields_and_tensors(dflash2, exported):
    raw, shape = config(exported["zlab"]), dflash2.config
    own = {name: raw["dflash_config"].pop(name) for name in OWN}
    assert own == {name: getattr(shape, name) for name in OWN}
    other = {"architectures": ["DFlash2DraftModel"], "dtype": "float32", "torch_dtype": "float32"}
    assert raw == golden("zlab_config.json") | other
    assert same(tensors(exported["zlab"]), dict(dflash2.state_dict()))


def test_speculators_layout_is_that_of_dflash_with_its_own_fields_and_tensors(dflash2, exported, vocabulary):
    raw, shape = config(exported["speculators"]), dflash2.config
    assert raw.pop("transformers_version")
    assert {name: raw.pop(name) for name in OWN} == {name: getattr(shape, name) for name in OWN}
    expected = golden("speculators_config.json")
    expected |= {"architectures": ["DFlash2DraftModel"], "speculators_model_type": "dflash2", "dtype": "float32"}
    expected["speculators_config"]["algorithm"] = "dflash2"
    assert raw == expected
    own = {"embed_tokens.weight": vocabulary.embedding, "lm_head.weight": vocabulary.head}
    assert same(tensors(exported["speculators"]), dict(dflash2.state_dict()) | own)


def test_new_tensors_have_the_names_and_shapes_that_servers_read(exported):
    rank, groups = 12, 32 // 8
    wanted = {
        "candidate_selector.predecessor_codebook": (270, rank),
        "candidate_selector.successor_codebook": (270, rank),
        "candidate_selector.hidden_projection.weight": (rank, 32),
    }
    for name in ("layers.0.attention_conv", "layers.0.mlp_conv", "layers.1.attention_conv", "layers.1.mlp_conv"):
        wanted |= {f"{name}.base_kernel": (2, 2, 32), f"{name}.kernel_projection.weight": (2 * 2 * groups, 32)}
    for layout in LAYOUTS:
        found = {name: tuple(value.shape) for name, value in tensors(exported[layout]).items()}
        assert {n: s for n, s in found.items() if "conv" in n or "selector" in n} == wanted


def test_cards_name_the_kind_and_say_how_it_is_served(exported):
    cards = {layout: (exported[layout] / "README.md").read_text() for layout in LAYOUTS}
    for card in cards.values():
        assert "A DFlash 2 block drafter" in card
        assert "\n- dflash2\n" in card
        assert '"method": "dflash"' in card  # vLLM's name of the method, for DFlash 2 too
    assert "- Layout: z-lab (DFlash2DraftModel)" in cards["zlab"]
    for words in ("DFlash2DraftModel.from_pretrained", "--speculative-algorithm DFLASH", "--spec-type draft-dflash"):
        assert words in cards["zlab"]
    assert "- Layout: speculators (dflash2)" in cards["speculators"]
    assert "sglang" not in cards["speculators"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_is_read_back_and_exported_again_bit_for_bit(dflash2, exported, facts, tmp_path, layout):
    expect_a_round_trip(dflash2, exported[layout], exported["zlab"], facts, tmp_path / "out")


def test_a_reduced_head_is_refused(dflash2, facts, vocabulary, tmp_path):
    reduced = vocabulary.restrict(torch.arange(3, 260, 2))
    with pytest.raises(UserError, match="draft_vocab_size: 129 found, 270 expected; a dflash2 drafter goes with"):
        export_speculators(dflash2, tmp_path / "s", target=facts, vocabulary=reduced)
    assert list(tmp_path.iterdir()) == []


def test_a_config_without_a_field_of_its_own_is_not_read(exported, tmp_path, capsys):
    change(exported["speculators"], drop("selector_rank"))
    line = refused(capsys, "import", exported["speculators"], f"--out={tmp_path / 'ours'}")
    assert "selector_rank: missing in the drafter's config.json; speculators' dflash2 layout expected" in line


CONV, SELECTOR = "layers.1.mlp_conv", "candidate_selector"
TENSORS = [
    Fault("another kernel", f"{CONV}.base_kernel", spoil(f"{CONV}.base_kernel", lambda t: t[:, :1].clone())),
    Fault("no kernel", f"{CONV}.base_kernel", lambda raw, weights: weights.pop(f"{CONV}.base_kernel")),
    Fault("a kernel as a weight", f"{CONV}.base_kernel.weight",
          rename(f"{CONV}.base_kernel", f"{CONV}.base_kernel.weight")),
    Fault("a codebook as an embedding", f"{SELECTOR}.successor_codebook.weight",
          rename(f"{SELECTOR}.successor_codebook", f"{SELECTOR}.successor_codebook.weight")),
    Fault("no projection", f"{SELECTOR}.hidden_projection.weight",
          lambda raw, weights: weights.pop(f"{SELECTOR}.hidden_projection.weight")),
    Fault("NaN", f"{SELECTOR}.predecessor_codebook",
          spoil(f"{SELECTOR}.predecessor_codebook", lambda t: t * torch.nan)),
]  # fmt: skip


def own(*path: str) -> list[Fault]:
    """Faults of the fields, which lie at `path`."""
    dotted = "".join(f"{name}." for name in path)
    return [
        *(Fault(f"no {name}", dotted + name, drop(*path, name)) for name in OWN),
        *(Fault(f"{name} in words", dotted + name, put(*path, name, to="2")) for name in OWN),
        *(Fault(f"{name} of zero", dotted + name, put(*path, name, to=0)) for name in OWN),
        Fault("groups that do not fill the channels", f"{dotted}conv_group_size", put(*path, "conv_group_size", to=5)),
        Fault("a kernel longer than the block", f"{dotted}conv_kernel_size", put(*path, "conv_kernel_size", to=7)),
        Fault("more candidates than tokens", f"{dotted}selector_top_k", put(*path, "selector_top_k", to=271)),
        Fault("another rank", f"{SELECTOR}.successor_codebook", put(*path, "selector_rank", to=8)),
        Fault("other groups", f"{CONV}.kernel_projection.weight", put(*path, "conv_group_size", to=16)),
        Fault("DFlash's architecture", "architectures", put("architectures", to=["DFlashDraftModel"])),
    ]


FAULTS = {
    "zlab": [
        *own("dflash_config"),
        *TENSORS,
        Fault("more pairs than llama.cpp holds", "dflash_config.selector_top_k",
              put("dflash_config", "selector_top_k", to=6)),
        Fault("nothing of the selector", "dflash_config.selector_top_k",
              all_of(drop("dflash_config", "selector_rank"), drop("dflash_config", "selector_top_k"))),
    ],
    "speculators": [
        *own(),
        *TENSORS,
        Fault("named DFlash", "speculators_model_type", put("speculators_model_type", to="dflash")),
        Fault("DFlash's algorithm", "speculators_config.algorithm",
              put("speculators_config", "algorithm", to="dflash")),
        Fault("a reduced head", "draft_vocab_size", put("draft_vocab_size", to=100)),
    ],
}  # fmt: skip
EACH = [pytest.param(layout, f, id=f"{layout}, {f.name}") for layout, faults in FAULTS.items() for f in faults]


@pytest.mark.parametrize(("layout", "fault"), EACH)
def test_every_fault_is_named(exported, facts, layout: str, fault: Fault, capsys):
    directory = exported[layout]
    assert check_directory(directory, facts).problems == ()
    change(directory, fault.edit)
    assert fault.field in [problem.field for problem in check_directory(directory, facts).problems]
    refused(capsys, "export", "--check", directory)


def test_speculators_layout_has_no_limit_of_llama_cpps(exported):
    assert check_directory(change(exported["speculators"], put("selector_top_k", to=6))).problems == ()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_are_compared_for_kernels_of_three_slots_too(target, facts, tmp_path, layout):
    settings = {"taps": TAPS, "mask_token_id": MASK, "block_size": BLOCK, "conv_kernel_size": 3}
    drafter, out = tiny_drafter("dflash2", target, **settings), tmp_path / layout
    {"zlab": export_zlab, "speculators": export_speculators}[layout](drafter, out, target=facts)
    change(out, lambda raw, weights: weights.pop("fc.weight"))
    assert "fc.weight" in [problem.field for problem in check_directory(out, facts).problems]
