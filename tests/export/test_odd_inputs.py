"""What export and import say of caches, flags and configs that do not belong together."""

import hashlib
import json
from dataclasses import replace

import pytest

from specauf import targets
from specauf.cache.location import Location, StoreError
from specauf.checkpoint import find_checkpoint, known_digests, load_drafter, weights_digest
from specauf.cli import main
from specauf.drafters import TargetVocabulary
from specauf.export import export_speculators
from tests.builder.conftest import make_target
from tests.evaluation.conftest import made_record
from tests.export.conftest import change, config, refused
from tests.training.conftest import write_tiny_cache


def test_a_card_names_no_corpus_but_the_drafters_own(run, cache, tmp_path):
    """A cache of the same target may have been rebuilt where the run's was."""
    other = write_tiny_cache(tmp_path / "other", documents=9, features="sketch", sketch_rank=24)
    for place, told in ((cache, True), (other, False)):
        out = tmp_path / f"out-{told}"
        assert main(["export", str(run), f"--out={out}", f"--cache={place}"]) == 0
        assert ("supervised tokens" in (out / "README.md").read_text()) is told


def test_a_card_does_not_claim_a_drafter_that_someone_else_may_have_trained(run, cache, tmp_path):
    """A directory does not say where its weights were trained, nor on what; a cache is given to compare with."""
    cards = []
    for source, name in ((run, "mine"), (tmp_path / "mine", "theirs")):
        assert main(["export", str(source), f"--out={tmp_path / name}", f"--cache={cache}"]) == 0
        cards.append((tmp_path / name / "README.md").read_text())
    assert ["trained with specauf" in card for card in cards] == [True, False]
    assert ["supervised tokens" in card for card in cards] == [True, False]
    assert "written by specauf from mine." in cards[1]
    assert main(["import", str(tmp_path / "mine"), f"--out={tmp_path / 'ours'}"]) == 0
    assert "for speculative decoding, written by specauf from mine." in (tmp_path / "ours/README.md").read_text()


def test_a_remote_cache_that_is_gone_or_silent_does_not_keep_a_run_from_its_export(run, tmp_path, capsys, monkeypatch):
    record = json.loads((run / "run.json").read_text()) | {"cache": "memory://gone/cache"}
    (run / "run.json").write_text(json.dumps(record))
    assert main(["export", str(run), f"--out={tmp_path / 'out'}"]) == 0
    assert "the target's config was not found" in capsys.readouterr().out

    def silent(self, name):
        raise StoreError("no answer; run the same command again")

    make_target().config.save_pretrained(tmp_path / "target")
    monkeypatch.setattr(Location, "read", silent)
    said = refused(capsys, "export", run, f"--out={tmp_path / 'other'}")
    assert "no answer; run the same command again, or give --target to export without" in said
    assert main(["export", str(run), f"--out={tmp_path / 'other'}", f"--target={tmp_path / 'target'}"]) == 0


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


def test_an_export_is_the_drafter_that_it_was_made_of(run, cache, tmp_path, capsys):
    """In an audit beside the evaluation of one, the other is no other drafter; nor is it on a card."""
    mine, evaluation = weights_digest(load_drafter(run)), run / "evaluation.json"
    record = made_record(name="x")
    for runs in (record["runs"], record["parts"][0]["runs"]):
        runs["x"] |= {"tau_pooled": 2.345, "tau_pooled_95": [2.1, 2.5]}
    for to, dtype in (("zlab", "bfloat16"), ("zlab", "float32"), ("speculators", "bfloat16")):
        out = tmp_path / f"{to}-{dtype}"
        assert main(["export", str(run), f"--out={out}", f"--to={to}", f"--dtype={dtype}"]) == 0
        assert weights_digest(load_drafter(out)) == mine
    evaluation.write_text(json.dumps(record | {"drafters": {"x": weights_digest(load_drafter(out))}}))
    audit = ["audit", str(cache), str(run), f"--evaluation={run}"]
    assert main(audit) == 0
    assert main(["export", str(run), f"--out={tmp_path / 'measured'}"]) == 0
    assert "2.345 pooled" in (tmp_path / "measured/README.md").read_text()
    # Records of before held a digest of the files.
    whole = hashlib.sha256(find_checkpoint(run).read_bytes()).digest()
    assert hashlib.sha256(whole).hexdigest() in known_digests(load_drafter(run), run)
    change(out, lambda raw, weights: weights["layers.0.mlp.up_proj.weight"].mul_(2))
    assert weights_digest(load_drafter(out)) != mine
    evaluation.write_text(json.dumps(record | {"drafters": {"x": weights_digest(load_drafter(out))}}))
    assert "has other weights than" in refused(capsys, *audit)


def test_embedding_and_head_are_read_for_the_layout_that_holds_them_alone(run, cache, tmp_path, monkeypatch):
    """Those of a large target are gigabytes."""
    monkeypatch.setattr(TargetVocabulary, "from_cache", None)
    monkeypatch.setattr(targets, "load_target", None)
    out, named = tmp_path / "out", tmp_path / "tiny.yaml"
    assert main(["export", str(run), f"--out={out}"]) == 0
    make_target().save_pretrained(tmp_path / "target")
    named.write_text(f"target: {{model: {tmp_path / 'target'}}}")
    for target in (f"--cache={cache}", f"--target={tmp_path / 'target'}", f"--target={named}"):
        assert main(["export", "--check", str(out), target]) == 0


def test_the_verifiers_class_is_named_where_its_config_does_not(drafter, facts, tmp_path):
    """As one that was read from a GGUF file."""
    export_speculators(drafter, tmp_path / "out", target=replace(facts, architectures=()))
    assert config(tmp_path / "out")["speculators_config"]["verifier"]["architectures"] == ["LlamaForCausalLM"]
