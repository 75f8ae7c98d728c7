"""What export and import say of caches, flags and configs that do not belong together."""

import json

import pytest

from specauf.cli import main
from tests.export.conftest import refused
from tests.training.conftest import write_tiny_cache


def test_a_card_names_no_corpus_but_the_drafters_own(run, cache, tmp_path):
    """A cache of the same target may have been rebuilt where the run's was."""
    other = write_tiny_cache(tmp_path / "other", documents=9, features="sketch", sketch_rank=24)
    for place, told in ((cache, True), (other, False)):
        out = tmp_path / f"out-{told}"
        assert main(["export", str(run), f"--out={out}", f"--cache={place}"]) == 0
        assert ("supervised tokens" in (out / "README.md").read_text()) is told


def test_a_flag_that_could_not_be_followed_is_refused(run, cache, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["export", str(run), f"--out={out}", "--to=speculators"]) == 0
    for words in ([f"--check={out}", "--push_to_hub=me/it"], [f"--check={out}", "--license=mit"]):
        assert "check: goes with --cache, --target and --json only" in refused(capsys, "export", *words)
    words = [out, f"--out={tmp_path / 'ours'}", f"--cache={cache}", "--num-target-layers=99"]
    assert "num_target_layers: 99 given, 8 in cache" in refused(capsys, "import", *words)


@pytest.mark.parametrize("to", ["zlab", "speculators"])
def test_a_config_of_the_wrong_types_is_one_line_whoever_reads_it(run, tmp_path, capsys, to):
    out = tmp_path / to
    assert main(["export", str(run), f"--out={out}", f"--to={to}"]) == 0
    whole = (out / "config.json").read_text()
    for field, value in (
        ("num_hidden_layers", "1"),
        ("rope_parameters", "x"),
        ("rope_theta", "x"),
        ("rms_norm_eps", "x"),
        ("layer_types", 5),
    ):
        raw = json.loads(whole)
        (raw["transformer_layer_config"] if to == "speculators" else raw)[field] = value
        (out / "config.json").write_text(json.dumps(raw))
        for words in (["import", out, f"--out={out}-ours"], ["export", "--check", out]):
            assert field in refused(capsys, *words)
