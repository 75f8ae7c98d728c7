"""There and back between the layouts without a changed byte, and the sketch folded without a changed output."""

import json

import pytest
import torch

from specauf.checkpoint import load_drafter, weights_digest
from specauf.cli import main
from specauf.drafters import DFlashDrafter
from specauf.errors import UserError
from specauf.export import export_speculators, export_zlab
from tests.drafters.tiny import TinyDocument, batch_of, prompt
from tests.export.conftest import BLOCK, change, config, same, tensors


def run(*words: object) -> None:
    assert main([str(word) for word in words]) == 0


@pytest.fixture
def target_json(target, tmp_path):
    path = tmp_path / "target.json"
    path.write_text(json.dumps(target.config.to_dict()))
    return path


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_zlab_to_ours_to_zlab_is_byte_equal(drafter, target_json, tmp_path, dtype):
    export_zlab(drafter, tmp_path / "theirs", dtype=getattr(torch, dtype))
    run("import", tmp_path / "theirs", f"--out={tmp_path / 'ours'}")
    run("export", tmp_path / "ours", "--to=zlab", f"--out={tmp_path / 'back'}", f"--dtype={dtype}")
    for name in ("ours", "back"):
        assert same(tensors(tmp_path / name), tensors(tmp_path / "theirs"))
        assert config(tmp_path / name) == config(tmp_path / "theirs")
        weights = (tmp_path / name / "model.safetensors").read_bytes()
        assert weights == (tmp_path / "theirs" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("dtype", "same_drafter"), [("bfloat16", True), ("float32", True), ("float16", False)])
def test_which_exports_count_as_what_they_were_made_of(drafter, tmp_path, dtype, same_drafter):
    export_zlab(drafter, tmp_path / "out", dtype=getattr(torch, dtype))
    assert (weights_digest(load_drafter(tmp_path / "out")) == weights_digest(drafter)) == same_drafter


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_ours_to_speculators_to_ours_is_byte_equal(drafter, facts, tmp_path, dtype):
    export_zlab(drafter, tmp_path / "ours", dtype=dtype)
    export_speculators(DFlashDrafter.from_pretrained(tmp_path / "ours"), tmp_path / "s", target=facts, dtype=dtype)
    run("import", tmp_path / "s", f"--out={tmp_path / 'back'}")
    assert same(tensors(tmp_path / "back"), tensors(tmp_path / "ours"))
    assert config(tmp_path / "back") == config(tmp_path / "ours")


def test_speculators_own_saved_config_is_read_with_its_defaults(drafter, facts, tmp_path):
    # The package writes neither the target's depth nor fields that equal transformers' defaults.
    export_speculators(drafter, tmp_path / "s", target=facts, dtype=torch.float32)

    def sparse(raw, weights):
        del raw["num_target_layers"]
        for name in ("attention_bias", "hidden_act", "initializer_range", "rope_theta", "rope_scaling"):
            del raw["transformer_layer_config"][name]

    change(tmp_path / "s", sparse)
    loaded = load_drafter(tmp_path / "s", 8)
    assert loaded.config == drafter.config
    assert same(loaded.state_dict(), drafter.state_dict())
    with pytest.raises(UserError, match="num_target_layers: not in speculators' config"):
        load_drafter(tmp_path / "s")


def test_a_prefix_or_a_missing_tensor_is_not_imported(drafter, facts, tmp_path, capsys):
    export_speculators(drafter, tmp_path / "s", target=facts)
    change(tmp_path / "s", lambda raw, weights: weights.__setitem__("model.norm.weight", weights.pop("norm.weight")))
    assert main(["import", str(tmp_path / "s"), f"--out={tmp_path / 'ours'}"]) == 2
    assert "tensor norm.weight missing" in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("whole", [True, False], ids=["rank = features", "rank < features"])
def test_folding_a_sketch_leaves_the_output_as_it_was(drafter, vocabulary, tmp_path, whole):
    wide = drafter.config.raw_feature_dim
    rank = wide if whole else 24
    random = torch.Generator().manual_seed(3)
    basis = torch.linalg.qr(torch.randn(wide, rank, generator=random)).Q
    scale = torch.rand(wide, generator=random) * 50 + 0.1
    on_sketch = drafter.with_fc(torch.randn(drafter.config.hidden_size, rank, generator=random) / rank**0.5).eval()
    assert on_sketch.servable == whole

    length, anchors = 20, [4, 9, 10]
    features = torch.randn(length, wide, generator=random) * scale
    sketch = (features / scale) @ basis
    ids, mask = prompt(length).numpy(), torch.ones(length, dtype=torch.bool).numpy()

    folded = on_sketch.fold_sketch({"basis": basis, "scale": scale})
    export_zlab(folded, tmp_path / "z", dtype=torch.float32)
    served = DFlashDrafter.from_pretrained(tmp_path / "z")
    with torch.no_grad():
        before = on_sketch(batch_of([TinyDocument(0, ids, mask, sketch.numpy())], [anchors], BLOCK), vocabulary)
        after = served(batch_of([TinyDocument(0, ids, mask, features.numpy())], [anchors], BLOCK), vocabulary)
    # The sum over features runs in another order, so equal to rounding and no further.
    assert (after - before).abs().max() < 1e-4 * before.abs().max()
    assert torch.equal(vocabulary.logits(after).argmax(-1), vocabulary.logits(before).argmax(-1))


def test_a_drafter_that_still_reads_a_sketch_is_refused(drafter, tmp_path):
    on_sketch = drafter.with_fc(torch.zeros(drafter.config.hidden_size, 24))
    with pytest.raises(UserError, match="reads a sketch of 24 numbers"):
        export_zlab(on_sketch, tmp_path / "z")
    assert list(tmp_path.iterdir()) == []
