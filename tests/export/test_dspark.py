"""DSpark drafters in both layouts: what is written, what is refused, and back."""

import shutil
from pathlib import Path

import pytest
import torch

from specauf.checkpoint import load_directory
from specauf.drafters import DSparkDrafter
from specauf.errors import UserError
from specauf.export import check_directory, export_speculators, export_zlab
from tests.drafters.tiny import tiny_drafter
from tests.export.conftest import BLOCK, MASK, TAPS, change, config, expect_a_round_trip, golden, refused, same, tensors
from tests.export.test_check import Fault, all_of, drop, put, rename, spoil

LAYOUTS = ("zlab", "speculators")
OWN = {
    "markov_rank": 8,
    "markov_head_type": "vanilla",
    "enable_confidence_head": True,
    "confidence_head_with_markov": True,
}
WIDTH, RANK = 32, 8
W1, W2, SURE = "markov_head.markov_w1.weight", "markov_head.markov_w2.weight", "confidence_head.proj"


def dspark(target, kind: str = "dspark", **changes) -> DSparkDrafter:
    drafter = tiny_drafter(kind, target, taps=TAPS, mask_token_id=MASK, block_size=BLOCK, **changes)
    assert isinstance(drafter, DSparkDrafter)
    return drafter


@pytest.fixture(scope="session", params=["dspark", "dspark of own slots"])
def drafter(target, request) -> DSparkDrafter:
    return dspark(target, request.param)


@pytest.fixture(scope="session")
def sound(drafter, facts, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sound")
    export_zlab(drafter, folder / "zlab", dtype=torch.float32, target=facts)
    out = folder / "speculators"
    export_speculators(drafter, out, dtype=torch.float32, target=facts, verifier="owner/tiny")
    return {layout: folder / layout for layout in LAYOUTS}


@pytest.fixture
def exported(sound, tmp_path) -> dict[str, Path]:
    return {layout: Path(shutil.copytree(sound[layout], tmp_path / layout)) for layout in LAYOUTS}


def test_zlab_layout_has_the_heads_fields_where_each_server_looks(drafter, exported):
    raw = config(exported["zlab"])
    assert raw["dflash_config"].pop("projector_type") == "dspark"
    for place in (raw, raw["dflash_config"]):
        assert {name: place.pop(name) for name in OWN} == OWN
    from_anchor = drafter.config.sample_from_anchor
    assert raw.pop("sample_from_anchor") is from_anchor
    for place in (raw, raw["dflash_config"]):
        place["block_size"] += from_anchor
    other = {"architectures": ["DSparkDraftModel"], "dtype": "float32", "torch_dtype": "float32"}
    assert raw == golden("zlab_config.json") | other
    assert same(tensors(exported["zlab"]), dict(drafter.state_dict()))


def test_speculators_layout_is_that_of_dflash_with_its_own_fields_and_tensors(drafter, exported, vocabulary):
    raw = config(exported["speculators"])
    assert raw.pop("transformers_version")
    assert {name: raw.pop(name) for name in OWN} == OWN
    raw["block_size"] += drafter.config.sample_from_anchor
    expected = golden("speculators_config.json")
    expected |= {"architectures": ["DSparkDraftModel"], "speculators_model_type": "dspark", "dtype": "float32"}
    expected["speculators_config"]["algorithm"] = "dspark"
    expected["sample_from_anchor"] = drafter.config.sample_from_anchor
    assert raw == expected
    own = {"embed_tokens.weight": vocabulary.embedding, "lm_head.weight": vocabulary.head}
    assert same(tensors(exported["speculators"]), dict(drafter.state_dict()) | own)


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("vanilla", {}),
        ("gated", {"markov_head.gate_proj.weight": (RANK, WIDTH + RANK), "markov_head.gate_proj.bias": (RANK,)}),
        (
            "rnn",
            {"markov_head.joint_proj.weight": (3 * RANK, 2 * RANK + WIDTH), "markov_head.joint_proj.bias": (3 * RANK,)},
        ),
    ],
)
@pytest.mark.parametrize("confident", [True, False])
def test_heads_have_the_names_and_shapes_that_servers_read(target, facts, tmp_path, kind, wanted, confident):
    export_zlab(dspark(target, markov_head_type=kind, enable_confidence_head=confident), tmp_path / "d", target=facts)
    wanted = wanted | {W1: (270, RANK), W2: (270, RANK)}
    wanted |= {f"{SURE}.weight": (1, WIDTH + RANK), f"{SURE}.bias": (1,)} if confident else {}
    found = {name: tuple(value.shape) for name, value in tensors(tmp_path / "d").items()}
    assert {n: s for n, s in found.items() if "markov" in n or "confidence" in n} == wanted
    card = (tmp_path / "d/README.md").read_text()
    assert "--speculative-algorithm DSPARK" in card
    assert ("vllm serve" in card) == ("llama-server" in card) == (kind == "vanilla")


def test_cards_name_the_kind_and_say_how_it_is_served(exported):
    cards = {layout: (exported[layout] / "README.md").read_text() for layout in LAYOUTS}
    for card in cards.values():
        assert "A DSpark block drafter" in card
        assert "\n- dspark\n" in card
        assert '"method": "dspark"' in card
        assert '"num_speculative_tokens": 5}' in card
        assert "- Drafted tokens a block: 5\n" in card
        assert "from dflash" not in card  # z-lab's package has no DSpark
    assert "- Layout: z-lab (DSparkDraftModel)" in cards["zlab"]
    assert "--spec-type draft-dspark --spec-draft-n-max 5\n" in cards["zlab"]
    assert "--speculative-dspark-block-size 5\n" in cards["zlab"]
    assert "- Layout: speculators (dspark)" in cards["speculators"]
    assert "sglang" not in cards["speculators"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_is_read_back_and_exported_again_bit_for_bit(drafter, exported, facts, tmp_path, layout):
    expect_a_round_trip(drafter, exported[layout], exported["zlab"], facts, tmp_path / "out")


def test_what_no_server_reads_in_speculators_layout_is_refused(target, drafter, facts, vocabulary, tmp_path):
    reduced = vocabulary.restrict(torch.arange(3, 260, 2))
    with pytest.raises(UserError, match="draft_vocab_size: 129 found, 270 expected; a dspark drafter goes with"):
        export_speculators(drafter, tmp_path / "s", target=facts, vocabulary=reduced)
    with pytest.raises(UserError, match="markov_head_type: rnn found, vanilla expected by vLLM; export --to zlab"):
        export_speculators(dspark(target, markov_head_type="rnn"), tmp_path / "s", target=facts)
    assert list(tmp_path.iterdir()) == []


def test_drafters_as_deepspec_stores_them_are_read(drafter, exported, vocabulary, tmp_path):
    raw, weights = config(exported["zlab"]), tensors(exported["zlab"])
    inner = raw.pop("dflash_config")
    flat = raw | {name: inner[name] for name in ("mask_token_id", "target_layer_ids")}
    flat |= {"architectures": ["Qwen3DSparkModel"], "num_anchors": 512}
    if drafter.config.sample_from_anchor:
        del flat["sample_from_anchor"]
    weights |= {"embed_tokens.weight": vocabulary.embedding, "lm_head.weight": vocabulary.head.clone()}
    change(exported["zlab"], lambda old, stored: (old.clear(), old.update(flat), stored.update(weights)))
    back = load_directory(exported["zlab"])
    assert back.config == drafter.config
    assert same(dict(back.state_dict()), dict(drafter.state_dict()))


def test_what_other_trainers_leave_out_is_what_servers_take(target, facts, tmp_path):
    plain = dspark(target, enable_confidence_head=False)
    export_zlab(plain, tmp_path / "d", dtype=torch.float32, target=facts)
    for name in ("markov_head_type", "enable_confidence_head", "confidence_head_with_markov"):
        change(tmp_path / "d", all_of(drop(name), drop("dflash_config", name)))
        assert load_directory(tmp_path / "d").config == plain.config
    assert "attention_mode" not in config(tmp_path / "d")["dflash_config"]
    assert dspark(target, num_key_value_heads=4).config.to_zlab()["dflash_config"]["attention_mode"] == "mha"


def test_a_block_of_one_drafted_token_may_be_exported(target, facts, tmp_path):
    shape = {"taps": TAPS, "mask_token_id": MASK, "block_size": 2}
    one = tiny_drafter("dspark", target, **shape)
    for write in (export_zlab, export_speculators):
        write(one, tmp_path / write.__name__, target=facts)
        assert config(tmp_path / write.__name__)["block_size"] == 1
        assert load_directory(tmp_path / write.__name__).config.block_size == 2


def test_a_reduced_head_of_others_is_sound_but_not_read(drafter, exported, vocabulary, tmp_path, capsys):
    ids = torch.arange(3, 260, 2)
    marked = torch.zeros(270, dtype=torch.bool)
    marked[ids] = True

    def reduce(raw, weights):
        raw["draft_vocab_size"] = len(ids)
        weights |= {"t2d": marked, "d2t": ids - torch.arange(len(ids))}
        weights |= {name: weights[name][ids].clone() for name in (W2, "lm_head.weight")}

    change(exported["speculators"], reduce)
    assert check_directory(exported["speculators"]).problems == ()
    line = refused(capsys, "import", exported["speculators"], f"--out={tmp_path / 'ours'}")
    assert "draft_vocab_size: 129 found, 270 expected; a dspark drafter is read with" in line


def test_a_config_that_does_not_say_where_its_slots_begin_is_read_as_servers_do(exported):
    change(exported["zlab"], drop("sample_from_anchor"))
    size = config(exported["zlab"])["block_size"]
    assert check_directory(exported["zlab"]).problems == ()
    back = load_directory(exported["zlab"])
    assert (back.config.sample_from_anchor, back.config.block_size) == (True, size + 1)


def test_a_config_without_a_field_of_its_own_is_not_read(exported, tmp_path, capsys):
    change(exported["speculators"], drop("markov_rank"))
    line = refused(capsys, "import", exported["speculators"], f"--out={tmp_path / 'ours'}")
    assert "markov_rank: missing in the drafter's config.json; speculators' dspark layout expected" in line


TENSORS = [
    Fault("another rank of W2", W2, spoil(W2, lambda t: t[:, :4].clone())),
    Fault("no W1", W1, lambda raw, weights: weights.pop(W1)),
    Fault("W1 by another name", "markov_head.w1.weight", rename(W1, "markov_head.w1.weight")),
    Fault("no confidence", f"{SURE}.weight", lambda raw, weights: weights.pop(f"{SURE}.weight")),
    Fault("no bias of the confidence", f"{SURE}.bias", lambda raw, weights: weights.pop(f"{SURE}.bias")),
    Fault("NaN", W1, spoil(W1, lambda t: t * torch.nan)),
]


def own(*path: str) -> list[Fault]:
    """Faults of the fields, which lie at `path`."""
    dotted = "".join(f"{name}." for name in path)
    return [
        *(Fault(f"no {name}", dotted + name, drop(*path, name)) for name in OWN),
        Fault("a confidence switch in words", f"{dotted}enable_confidence_head",
              put(*path, "enable_confidence_head", to="yes")),
        Fault("rank in words", f"{dotted}markov_rank", put(*path, "markov_rank", to="8")),
        Fault("rank of zero", f"{dotted}markov_rank", put(*path, "markov_rank", to=0)),
        Fault("an unknown head", f"{dotted}markov_head_type", put(*path, "markov_head_type", to="lstm")),
        Fault("a number for a switch", f"{dotted}enable_confidence_head", put(*path, "enable_confidence_head", to=1)),
        Fault("a confidence without the token", f"{dotted}confidence_head_with_markov",
              put(*path, "confidence_head_with_markov", to=False)),
        Fault("DFlash's architecture", "architectures", put("architectures", to=["DFlashDraftModel"])),
        Fault("a word for a switch", "sample_from_anchor", put("sample_from_anchor", to="yes")),
    ]  # fmt: skip


FAULTS = {
    "zlab": [
        *own(),
        *own("dflash_config"),
        *TENSORS,
        Fault("two ranks", "markov_rank", put("markov_rank", to=4)),
        Fault("another rank", W2, all_of(put("markov_rank", to=4), put("dflash_config", "markov_rank", to=4))),
        Fault("another head", "architectures", put("dflash_config", "projector_type", to="domino")),
        Fault("no projector", "dflash_config.projector_type", drop("dflash_config", "projector_type")),
    ],
    "speculators": [
        *own(),
        *TENSORS,
        Fault("another rank", W2, put("markov_rank", to=4)),
        Fault("a head that vLLM has not", "markov_head_type", put("markov_head_type", to="gated")),
        Fault("named DFlash", "speculators_model_type", put("speculators_model_type", to="dflash")),
        Fault("DFlash's algorithm", "speculators_config.algorithm",
              put("speculators_config", "algorithm", to="dflash")),
        Fault("nobody says from where it predicts", "sample_from_anchor", drop("sample_from_anchor")),
        Fault("the other way to count", "speculative_tokens", lambda raw, weights: raw.update(
              sample_from_anchor=not raw["sample_from_anchor"])),
        Fault("a reduced head in name alone", W2, put("draft_vocab_size", to=100)),
    ],
}  # fmt: skip
EACH = [pytest.param(layout, f, id=f"{layout}, {f.name} ({f.field})") for layout, fs in FAULTS.items() for f in fs]


@pytest.mark.parametrize(("layout", "fault"), EACH)
def test_every_fault_is_named(exported, facts, layout: str, fault: Fault, capsys):
    directory = exported[layout]
    assert check_directory(directory, facts).problems == ()
    change(directory, fault.edit)
    assert fault.field in [problem.field for problem in check_directory(directory, facts).problems]
    refused(capsys, "export", "--check", directory)
