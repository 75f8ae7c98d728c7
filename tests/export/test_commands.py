"""`specauf export` and `specauf import` as a user runs them, from a run directory that `specauf fit` wrote."""

import functools
import json
import shlex
import sys
from dataclasses import replace

import pytest
import torch

from specauf.cache import open_cache
from specauf.checkpoint import find_checkpoint, load_drafter, weights_digest
from specauf.cli import main
from specauf.drafters import DFlashDrafter, DominoSpec, MaskedSpec
from specauf.errors import UserError
from specauf.evaluation import cli as evaluation_cli
from specauf.evaluation.cli import evaluate_command
from specauf.evaluation.settings import Setting
from specauf.export import TargetFacts, export_speculators, export_zlab
from specauf.export.card import About
from specauf.export.source import with_cache
from tests.drafters.tiny import tiny_dflash, tiny_target
from tests.export.conftest import change, config, refused, same, tensors
from tests.processes import forked, limit_files


def on_a_full_disk(words: list[str]) -> None:
    limit_files(10_000)
    sys.exit(main(words))


@pytest.mark.parametrize("to", ["zlab", "speculators"])
def test_a_full_disk_is_one_line_and_leaves_nothing(run, tmp_path, to):
    out = tmp_path / "exports" / "out"
    done = forked(on_a_full_disk, ["export", str(run), f"--to={to}", f"--out={out}"])
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {out} cannot be written (")
    assert done.stderr.count("\n") == 1
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("to", ["zlab", "speculators"])
def test_a_run_directory_is_exported_and_checked_against_its_cache(run, cache, tmp_path, capsys, to):
    out, record = tmp_path / "out", tmp_path / "out.json"
    assert main(["export", str(run), f"--to={to}", f"--out={out}", f"--json={record}"]) == 0
    assert f"checked against cache {cache}" in capsys.readouterr().out
    assert json.loads(record.read_text()) == {
        "out": str(out), "layout": to, "dtype": "bfloat16", "tensors": 25 if to == "zlab" else 27,
    }  # fmt: skip
    assert main(["export", "--check", str(out), f"--cache={cache}"]) == 0
    assert f"{out}: sound ({to} layout" in capsys.readouterr().out
    assert sorted(p.name for p in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    # The sketch's basis is folded: fc reads the raw features that servers have.
    assert tensors(out)["fc.weight"].shape == (32, 5 * 32)


def test_a_checkpoint_file_gives_the_same_weights_as_its_run(run, tmp_path):
    assert main(["export", str(run), f"--out={tmp_path / 'a'}"]) == 0
    best = find_checkpoint(run)
    assert main(["export", str(best), f"--out={tmp_path / 'b'}", "--to", "zlab"]) == 0
    assert same(tensors(tmp_path / "a"), tensors(tmp_path / "b"))


def _asked(command, asked):
    """The command's options, kept instead of obeyed."""

    @functools.wraps(command)
    def keep(**options):
        asked.update(options)

    return keep


def test_the_card_says_what_the_run_was(run, tmp_path, monkeypatch):
    evaluation = {
        "format": 2, "target": "tiny", "dtype": "float32", "drafters": {"auf": weights_digest(load_drafter(run))},
        "benchmark": Setting(128, block_size=4).to_dict()
        | {"name": "humaneval", "prompts": 32, "setting": "greedy, block 4"},
        "environment": {"date": "2026-11-24"},
        "runs": {"auf": {"tau_pooled": 2.345, "tau_pooled_95": [2.1, 2.5], "tau_per_prompt": 2.4}},
    }  # fmt: skip
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    assert main(["export", str(run), f"--out={tmp_path / 'out'}", "--license=apache-2.0"]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n")
    assert "- Target: tiny/target" in card
    assert "- Corpus: made-up, answered by the target: 24 documents" in card
    assert "AcceptUntilFail" in card.split("- Objective: ")[1].splitlines()[0]
    assert "- Optimizer steps: 2" in card
    measured = next(line for line in card.splitlines() if line.startswith("- 2.345"))
    assert "humaneval, 32 prompts, greedy, block 4; `specauf evaluate auf --target tiny" in measured
    asked = {}
    command = shlex.split(measured.split("`")[1])
    monkeypatch.setattr(evaluation_cli, "evaluate_command", _asked(evaluate_command, asked))
    assert main(command[1:]) == 0
    assert (asked["drafters"], asked["target"], asked["benchmarks"]) == (["auf"], "tiny", ["humaneval"])
    assert (asked["limit"], asked["max_new_tokens"], asked["dtype"]) == (32, 128, "float32")
    assert (asked["temperatures"], asked["block_sizes"]) == ([0], [4])
    assert "2026-11-24" in measured
    for words in ("DFlashDraftModel.from_pretrained", "vllm serve", "sglang.launch_server", "convert_hf_to_gguf.py"):
        assert words in card
    # Nothing of the machine it was trained on.
    assert str(tmp_path) not in card
    assert str(run.parent) not in card


def test_a_card_tells_nothing_of_other_weights_or_of_where_the_target_lay(run, tmp_path, capsys):
    figures = {"tau_pooled": 2.345, "tau_pooled_95": [2.1, 2.5], "tau_per_prompt": 2.4}
    record = {
        "format": 2, "target": str(tmp_path / "secret" / "tiny"), "dtype": "float32",
        "runs": {"auf": figures, "old": figures},
        "benchmark": Setting(128).to_dict() | {"name": "humaneval", "prompts": 32, "setting": "greedy"},
        "environment": {"date": "2026-11-24"},
        "drafters": {"old": "of other weights", "auf": weights_digest(load_drafter(run))},
    }  # fmt: skip
    file = run / "evaluation.json"
    file.write_text(json.dumps(record))
    assert main(["export", str(run), f"--out={tmp_path / 'out'}"]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.count("2.345") == 1
    assert "specauf evaluate auf --target tiny " in card
    assert "secret" not in card
    stale = record | {"drafters": {"auf": "of a checkpoint before it was trained on"}}
    file.write_text(json.dumps(stale))
    (run.parent / "evaluation.json").write_text(json.dumps(record))
    assert main(["export", str(run), f"--out={tmp_path / 'beside'}"]) == 0
    assert "2.345" in (tmp_path / "beside" / "README.md").read_text()
    (run.parent / "evaluation.json").unlink()
    assert main(["export", str(run), f"--out={tmp_path / 'again'}"]) == 0
    assert "Not measured." in (tmp_path / "again" / "README.md").read_text()
    for wrong in ({"tau_pooled": "2.3"}, {"tau_pooled_95": []}):
        file.write_text(json.dumps(record | {"runs": {"auf": figures | wrong}}))
        assert "not as `specauf evaluate` writes it" in refused(capsys, "export", run, f"--out={tmp_path / 'wrong'}")


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("run.json", "{", "run.json: not JSON"),
        ("run.json", "[]", "run.json: an object expected"),
        ("evaluation.json", '{"format": 2, "drafters": 5}', "evaluation.json: not as `specauf evaluate` writes it"),
        ("evaluation.json", "{", "evaluation.json: not JSON"),
    ],
)
def test_a_file_beside_the_run_that_is_broken_is_one_line(run, tmp_path, capsys, file, content, says):
    (run / file).write_text(content)
    assert says in refused(capsys, "export", run, f"--out={tmp_path / 'out'}")


def test_a_cache_of_a_hub_target_does_not_make_a_local_verifier_one(cache):
    manifest = open_cache(str(cache)).manifest
    target = {"id": "acme/tiny", "revision": "a" * 40}
    manifest = replace(manifest, identity=replace(manifest.identity, target=target))
    assert with_cache(About(), manifest).target_on_hub
    assert not with_cache(About(target="llama-local"), manifest).target_on_hub


def test_how_gemma_embeds_stays_with_the_drafter(tmp_path):
    target = tiny_target("gemma")
    target.config.save_pretrained(tmp_path / "target")
    export_zlab(tiny_dflash(target), tmp_path / "one")
    scale = config(tmp_path / "one")["dflash_config"]["input_embedding_scale"]
    assert scale == pytest.approx(32**0.5)
    assert main(["import", str(tmp_path / "one"), f"--out={tmp_path / 'two'}"]) == 0
    assert main(["export", str(tmp_path / "two"), f"--out={tmp_path / 'three'}"]) == 0
    assert config(tmp_path / "three")["dflash_config"]["input_embedding_scale"] == scale
    assert main(["export", "--check", str(tmp_path / "three"), f"--target={tmp_path / 'target/config.json'}"]) == 0


def test_a_card_admits_what_was_not_measured_or_not_said(run, tmp_path):
    assert main(["export", str(run), f"--out={tmp_path / 'out'}"]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Not measured." in card
    assert "license: unknown" in card
    assert "not stated (set with `--license`)" in card


def test_speculators_card_shows_only_what_reads_that_layout(run, cache, tmp_path):
    assert main(["export", str(run), "--to=speculators", f"--out={tmp_path / 'out'}"]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "vllm serve" in card
    assert "this directory holds the target's embedding and head" in card
    for words in ("sglang", "convert_hf_to_gguf"):
        assert words not in card


def test_an_import_is_compared_with_the_cache_and_keeps_its_precision(run, cache, tmp_path, capsys):
    assert main(["export", str(run), "--to=speculators", f"--out={tmp_path / 's'}", "--dtype=float32"]) == 0
    assert main(["import", str(tmp_path / "s"), f"--out={tmp_path / 'ours'}", f"--cache={cache}"]) == 0
    capsys.readouterr()
    DFlashDrafter.from_pretrained(tmp_path / "ours")
    assert config(tmp_path / "ours")["dtype"] == "float32"


def test_check_lists_every_problem_and_fails(run, cache, tmp_path, capsys):
    out, record = tmp_path / "out", tmp_path / "check.json"
    assert main(["export", str(run), f"--out={out}"]) == 0

    def spoil(raw, weights):
        del raw["rope_theta"]
        raw["dflash_config"]["causal"] = True

    change(out, spoil)
    capsys.readouterr()
    assert main(["export", "--check", str(out), f"--cache={cache}", f"--json={record}"]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: {out}: dflash_config.causal: True found, False expected")
    assert printed.err.endswith("(and 1 more, see above): export it again with `specauf export`\n")
    assert len(printed.out.splitlines()) == 2
    found = json.loads(record.read_text())
    assert {p["field"] for p in found["problems"]} == {"rope_theta", "dflash_config.causal"}


def test_refusals_are_one_line_and_leave_nothing(run, cache, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("specauf.export.hub.get_token", lambda: None)
    checkpoint = next((run / "checkpoints").glob("*.ckpt"))
    place = tmp_path / "place"
    place.mkdir()
    out = place / "out"

    def edited(name, edit):
        content = torch.load(checkpoint, weights_only=True)
        edit(content)
        torch.save(content, tmp_path / name)
        return tmp_path / name

    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(checkpoint.read_bytes()[:5000])
    text = tmp_path / "text.ckpt"
    text.write_text("not a checkpoint")
    later = edited("later.ckpt", lambda c: c["specauf"].update(format=2))
    foreign = edited("foreign.ckpt", lambda c: c.pop("specauf"))
    incomplete = edited("incomplete.ckpt", lambda c: c["state_dict"].pop("drafter.norm.weight"))
    field = edited("field.ckpt", lambda c: c["specauf"]["config"].update(novel=1))
    broken = edited("broken.ckpt", lambda c: c["state_dict"]["drafter.norm.weight"].fill_(torch.nan))
    given = ("--out", out, f"--cache={cache}")
    for source, says in (
        (cut, "it is damaged or not a checkpoint"),
        (text, "it is damaged or not a checkpoint"),
        (later, "format 2 found, 1 expected; another version of specauf wrote it"),
        (foreign, "was not written by `specauf fit`"),
        (incomplete, "config and weights do not make a dflash drafter"),
        (field, "unknown fields ['novel']; written by another version of specauf"),
        (broken, "norm.weight: holds numbers that are not finite"),
        (tmp_path / "nowhere", "does not exist"),
        (cache, "holds no drafter"),
    ):
        assert says in refused(capsys, "export", source, *given)
    assert "exports never write over anything" in refused(capsys, "export", run, "--out", place)
    assert "no token found: run `hf auth login`" in refused(capsys, "export", run, *given, "--push-to-hub=owner/name")
    assert "is no repository id" in refused(capsys, "export", run, *given, "--push-to-hub=a/b/c")
    assert "--out are needed" in refused(capsys, "export", run)
    assert "both given, one expected" in refused(capsys, "export", run, *given, "--target=x")
    assert "to" in refused(capsys, "export", run, *given, "--to=gguf")
    assert list(place.iterdir()) == []


def test_an_upload_that_fails_keeps_the_export(run, tmp_path, capsys, monkeypatch):
    import huggingface_hub

    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("specauf.export.hub.get_token", lambda: "token")
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", offline)
    out = tmp_path / "out"
    says = refused(capsys, "export", run, f"--out={out}", "--push-to-hub=owner/name")
    assert f"no route to host); the export is whole in {out}" in says
    assert main(["export", "--check", str(out)]) == 0


def test_an_upload_sends_the_directory(run, tmp_path, monkeypatch, capsys):
    import huggingface_hub

    sent = {}
    monkeypatch.setattr("specauf.export.hub.get_token", lambda: "token")
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, repo, **_: sent.update(made=repo))
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", lambda self, **said: sent.update(said))
    assert main(["export", str(run), f"--out={tmp_path / 'out'}", "--push-to-hub=owner/name"]) == 0
    assert (sent["made"], sent["repo_id"], sent["folder_path"]) == ("owner/name", "owner/name", tmp_path / "out")
    assert "uploaded https://huggingface.co/owner/name" in capsys.readouterr().out


def test_drafters_that_no_server_reads_are_refused_with_what_runs_them(cache, tmp_path):
    found = open_cache(str(cache))
    facts = TargetFacts.from_cache(found, "the cache")
    masked = MaskedSpec(block_size=6).build(found.manifest, found.target)
    message = (
        r"drafter masked: no server reads this kind, dflash, dflash2, domino or dspark expected; .* decode with it"
    )
    for write in (export_zlab, export_speculators):
        with pytest.raises(UserError, match=message):
            write(masked, tmp_path / "out", target=facts)
    domino = DominoSpec(block_size=6, pure_draft_prefix_len=2).build(found.manifest, found.target)
    with pytest.raises(UserError, match=r"drafter domino: .* speculators' layout; export --to zlab, for SGLang"):
        export_speculators(domino, tmp_path / "out", target=facts)
    with pytest.raises(UserError, match=r"pure_draft_prefix_len: 2 found, 1 expected by SGLang; .* train with 1"):
        export_zlab(domino, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_without_the_cache_the_export_says_what_it_could_not_compare(run, tmp_path, capsys):
    record = json.loads((run / "run.json").read_text()) | {"cache": "/moved/away"}
    (run / "run.json").write_text(json.dumps(record))
    assert main(["export", str(run), f"--out={tmp_path / 'out'}"]) == 0
    assert "rope, taps and vocabulary were not compared: give --cache" in capsys.readouterr().out
    says = refused(capsys, "export", run, "--to=speculators", f"--out={tmp_path / 's'}")
    assert "speculators' layout holds the target's embedding and head" in says
