"""`init`: going on from a drafter that exists, and refusing one of another target before the first step."""

from pathlib import Path

import pytest
import torch

from specauf.cache import open_cache
from specauf.cli import main
from specauf.drafters import (
    DFlash2Drafter,
    DFlash2Spec,
    DFlashDrafter,
    DFlashSpec,
    DominoDrafter,
    DominoSpec,
    DSparkDrafter,
    DSparkSpec,
    MaskedSpec,
)
from specauf.errors import UserError
from specauf.export import export_speculators
from specauf.export.facts import TargetFacts
from tests.training.conftest import write_tiny_cache
from tests.training.running import arguments


@pytest.fixture(scope="module")
def trained(tiny_cache: Path):
    """A drafter with random weights for the tiny cache."""
    cache = open_cache(str(tiny_cache))
    torch.manual_seed(5)
    return DFlashSpec(num_hidden_layers=1, block_size=6).build(cache.manifest, cache.target)


def build(spec, cache: Path):
    opened = open_cache(str(cache))
    return spec.build(opened.manifest, opened.target)


def test_a_zlab_directory_gives_weights_and_shape(trained, tiny_cache: Path, tmp_path: Path):
    trained.save_pretrained(tmp_path / "zlab")
    # The spec asks for two layers, the drafter has one: the drafter decides.
    drafter = build(DFlashSpec(block_size=6, init=tmp_path / "zlab", activation_checkpointing=True), tiny_cache)
    assert drafter.training
    assert drafter.activation_checkpointing
    assert drafter.config.num_hidden_layers == 1
    for name, value in trained.state_dict().items():
        assert torch.equal(drafter.state_dict()[name], value)


def test_a_speculators_directory_does_too(trained, tiny_cache: Path, tmp_path: Path):
    target = TargetFacts.from_cache(open_cache(str(tiny_cache)), "the cache")
    export_speculators(trained, tmp_path / "speculators", target=target, dtype=torch.float32)
    drafter = build(DFlashSpec(block_size=6, init=tmp_path / "speculators"), tiny_cache)
    for name, value in trained.state_dict().items():
        assert torch.equal(drafter.state_dict()[name], value)


@pytest.mark.filterwarnings("ignore")  # Lightning's; a process of its own would take seconds
def test_a_run_goes_on_from_a_run(trained, tiny_cache: Path, tmp_path: Path):
    trained.save_pretrained(tmp_path / "zlab")
    still = ["--model.loss=auf", "--trainer.max_steps=1", "--trainer.limit_val_batches=0",
             "--model.optimizer.init_args.lr=0.0", "--model.drafter.init_args.block_size=6"]  # fmt: skip
    for name, init in (("first", tmp_path / "zlab"), ("second", tmp_path / "first")):
        assert main(arguments(tiny_cache, tmp_path / name, *still, f"--model.drafter.init_args.init={init}")) == 0
        # With a rate of 0 the checkpoint holds the weights that it started from.
        state = torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        assert torch.equal(state["drafter.fc.weight"], trained.fc.weight)


def test_a_dflash_drafter_becomes_the_backbone_of_a_domino_drafter(trained, tiny_cache: Path, tmp_path: Path):
    trained.save_pretrained(tmp_path / "zlab")
    spec = DominoSpec(block_size=6, init=tmp_path / "zlab", gru_hidden_dim=8, emb_dim=4, auf_on="own", base_start=0.5)
    drafter = build(spec, tiny_cache)
    assert isinstance(drafter, DominoDrafter)
    assert torch.equal(drafter.fc.weight, trained.fc.weight)
    assert drafter.embed_proj[2].weight.shape == (270, 4)
    assert (drafter.auf_on, drafter.base_start) == ("own", 0.5)


def test_a_dflash_drafter_becomes_a_dflash_2_drafter_that_drafts_the_same(trained, tiny_cache: Path, tmp_path: Path):
    trained.save_pretrained(tmp_path / "zlab")
    # Two layers are asked for: the drafter's one decides.
    spec = DFlash2Spec(block_size=6, init=tmp_path / "zlab", selector_rank=8, conv_group_size=2, auf_on="own")
    drafter = build(spec, tiny_cache)
    assert isinstance(drafter, DFlash2Drafter)
    assert (drafter.auf_on, drafter.config.num_hidden_layers, drafter.config.selector_rank) == ("own", 1, 8)
    for name, value in trained.state_dict().items():
        assert torch.equal(drafter.state_dict()[name], value)
    conv = drafter.layers[0].attention_conv.base_kernel
    assert torch.equal(conv[:, 0], torch.ones_like(conv[:, 0]))
    assert not conv[:, 1].any()
    assert not drafter.candidate_selector.successor_codebook.any()
    drafter.save_pretrained(tmp_path / "two")
    again = build(DFlash2Spec(block_size=6, init=tmp_path / "two", base_weight=0.5), tiny_cache)
    assert (again.auf_on, again.base_weight, again.config.selector_rank) == ("base", 0.5, 8)


def test_a_dflash_drafter_becomes_a_dspark_drafter_that_drafts_the_same(trained, tiny_cache: Path, tmp_path: Path):
    trained.save_pretrained(tmp_path / "zlab")
    spec = DSparkSpec(
        block_size=6, init=tmp_path / "zlab", markov_rank=8, confidence_weight=0.5, sample_from_anchor=False
    )
    drafter = build(spec, tiny_cache)
    assert isinstance(drafter, DSparkDrafter)
    assert (drafter.confidence_weight, drafter.config.num_hidden_layers, drafter.config.markov_rank) == (0.5, 1, 8)
    for name, value in trained.state_dict().items():
        assert torch.equal(drafter.state_dict()[name], value)
    assert not drafter.markov_head.markov_w2.weight.any()
    drafter.save_pretrained(tmp_path / "spark")
    more = {"block_size": 6, "init": tmp_path / "spark", "confidence_weight": 0.25}
    again = build(DSparkSpec(**more, sample_from_anchor=False), tiny_cache)
    assert (again.confidence_weight, again.config.markov_rank, again.config.sample_from_anchor) == (0.25, 8, False)
    for name in ("zlab", "spark"):
        with pytest.raises(UserError, match=r"sample_from_anchor: False in .*, True in the cache and config"):
            build(DSparkSpec(block_size=6, init=tmp_path / name), tiny_cache)
    with pytest.raises(UserError, match=r"enable_confidence_head: True in .*, False in the cache and config"):
        build(DSparkSpec(**more, sample_from_anchor=False, enable_confidence_head=False), tiny_cache)


def test_a_served_drafter_goes_on_from_a_cache_of_sketches(trained, tmp_path: Path):
    cache = write_tiny_cache(tmp_path / "cache", documents=8, features="sketch", sketch_rank=12)
    trained.save_pretrained(tmp_path / "zlab")
    drafter = build(DFlashSpec(block_size=6, init=tmp_path / "zlab"), cache)
    assert isinstance(drafter, DFlashDrafter)
    document = open_cache(str(cache)).document(0)
    torch.testing.assert_close(
        drafter.fc(torch.from_numpy(document.sketch)),
        trained.fc(torch.from_numpy(document.features)),
        atol=1e-4,
        rtol=1e-4,
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"taps": (1, 2, 3)}, r"taps: \(1, 2, 3\) in .*, \(1, 2, 3, 4, 5\) in the cache"),
        ({"vocab_size": 300}, "vocab_size: 300 in .*, 270 in the cache"),
        ({"hidden_size": 16}, "hidden_size: 16 in .*, 32 in the cache"),
        ({"num_target_layers": 9}, "num_target_layers: 9 in .*, 8 in the cache"),
        ({"block_size": 8}, "block_size: 8 in .*, 6 in the cache and config"),
        ({"mask_token_id": 7}, "mask_token_id: 7 in .*, 258 in the cache"),
    ],
)
def test_another_targets_drafter_is_refused_with_both_values(
    trained, tiny_cache: Path, tmp_path: Path, changes, message
):
    from dataclasses import replace

    config = replace(trained.config, **changes)
    config = replace(config, feature_dim=config.raw_feature_dim)
    DFlashDrafter(config).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=message):
        build(DFlashSpec(block_size=6, init=tmp_path / "other"), tiny_cache)


def test_another_kind_of_drafter_is_refused(trained, tiny_cache: Path, tmp_path: Path):
    build(DominoSpec(block_size=6, gru_hidden_dim=8), tiny_cache).save_pretrained(tmp_path / "domino")
    with pytest.raises(UserError, match="holds a domino drafter, dflash expected; train DRAFTER=domino"):
        build(DFlashSpec(block_size=6, init=tmp_path / "domino"), tiny_cache)
    trained.save_pretrained(tmp_path / "zlab")
    with pytest.raises(UserError, match="holds a dflash drafter, masked expected; train DRAFTER=dflash"):
        build(MaskedSpec(block_size=6, init=tmp_path / "zlab"), tiny_cache)
