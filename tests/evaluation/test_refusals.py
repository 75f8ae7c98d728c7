"""Every mistake of a user is one line that says what to do, with status 2."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from specauf.cli import main
from specauf.drafters import TargetVocabulary
from specauf.errors import UserError
from specauf.export import TargetFacts, export_speculators
from tests.builder.conftest import make_target, make_tokenizer
from tests.evaluation.conftest import command, tiny_drafter

CASES = {
    "missing file": (["--benchmarks=[nosuch.jsonl]"], "benchmark file nosuch.jsonl does not exist"),
    "empty file": (["--benchmarks=[{tmp}/empty.jsonl]"], "empty.jsonl holds no prompt"),
    "malformed file": (["--benchmarks=[{tmp}/broken.jsonl]"], "broken.jsonl line 2 is not JSON"),
    "wrong fields": (["--benchmarks=[{tmp}/fields.jsonl]"], "fields.jsonl line 1 has question"),
    "wrong fields of a set": (["--benchmarks=[math500={tmp}/fields.jsonl]"], "give the fields of math500"),
    "not text": (["--benchmarks=[{tmp}/binary.jsonl]"], "is not UTF-8 text"),
    "not parquet": (["--benchmarks=[{tmp}/bad.parquet]"], "is not Parquet"),
    "unknown name": (["--benchmarks=[humanevil]"], "unknown benchmark 'humanevil'. Did you mean humaneval?"),
    "limit": (["--limit=0"], "limit is 0"),
    "temperature": (["--temperatures=[-1]"], "temperature: -1.0 found"),
    "no temperature": (["--temperatures=[]"], "temperatures: none given"),
    "temperature twice": (["--temperatures=[0, 0]"], "temperatures: 0.0 given twice"),
    "temperature that is no number": (["--temperatures=[.nan]"], "temperature: nan found"),
    "temperature too near 0": (["--temperatures=[1e-45]"], "temperature: 1e-45 found"),
    "one token": (["--max_new_tokens=1"], "max_new_tokens is 1: give at least 2"),
    "no benchmark": (["--benchmarks=[]"], "benchmarks: none given"),
    "two files of one name": (["--benchmarks=[{tmp}/p.jsonl, {tmp}/sub/p.jsonl]"], "benchmarks: p given twice"),
    "block size twice": (["--block_sizes=[3, 3]"], "block_sizes: 3 given twice"),
    "no such device": (["--device=gpu0"], "device: gpu0 found; cpu, cuda or cuda:N expected"),
    "no such card": (["--device=cuda:99"], "device: cuda:99 found"),
    "out is a file": (["--out={tmp}/broken.jsonl"], "broken.jsonl: File exists"),
    "a damaged target": (["--target={tmp}/cut"], "and weights with --target (of cache-builder --target.model)"),
    "an incomplete target": (
        ["--target={tmp}/lacking"],
        "1 tensors are missing from its weights, the first model.layers.3",
    ),
    "top_p": (["--temperatures=[1]", "--top_p=2"], "top_p: 2.0 found"),
    "what only sampling reads": (["--top_k=5"], "top_k is 5, but all temperatures are 0"),
    "another sampling": (["--sampling=greedy-draft"], "sampling is greedy-draft, but all temperatures are 0"),
    "block size": (["--block_sizes=[9]"], "block_sizes: 9 found, 2 to 6 expected"),
    "target": (["--target=nosuch"], "nosuch"),
    "other target": (["--target={tmp}/other"], "num_target_layers 8, this target has 5"),
    "missing cache": (["--cache={tmp}/nosuch"], "nosuch does not exist"),
    "a list without brackets": (["--temperatures=0.5"], "Expected a list, as in [A, B]. Got value: 0.5"),
    "unknown option": (["--nosuch=1"], "nosuch"),
}


@pytest.mark.parametrize("case", CASES)
def test_evaluate_refuses_in_one_line(case, place, tmp_path, capsys):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"}\n{broken\n')
    (tmp_path / "fields.jsonl").write_text('{"question": "a"}\n')
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "bad.parquet").write_bytes(b"PAR0")
    if case == "other target":
        make_target(layers=5).save_pretrained(tmp_path / "other")
        make_tokenizer().save_pretrained(tmp_path / "other")
    options, says = CASES[case]
    if "{tmp}/lacking" in options[0] or "{tmp}/cut" in options[0]:
        for name in ("lacking", "cut"):
            shutil.copytree(place / "target", tmp_path / name)
        weights = load_file(place / "target/model.safetensors")
        del weights["model.layers.3.mlp.up_proj.weight"]
        save_file(weights, tmp_path / "lacking/model.safetensors", metadata={"format": "pt"})
        whole = (place / "target/model.safetensors").read_bytes()
        (tmp_path / "cut/model.safetensors").write_bytes(whole[: len(whole) // 2])
    capsys.readouterr()
    assert main(command(place, tmp_path / "out", *(o.format(tmp=tmp_path) for o in options))) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("drafters", "says"),
    [
        (["{place}/nosuch"], "nosuch does not exist"),
        (["{place}"], "holds no drafter"),
        (["{place}/one", "{place}/one"], "two are called one"),
    ],
)
def test_evaluate_refuses_drafters(drafters, says, place, tmp_path, capsys):
    words = [w for w in command(place, tmp_path) if not w.startswith(("first", "second"))]
    assert main([words[0], *(d.format(place=place) for d in drafters), *words[1:]]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_rows_of_other_drafters_are_refused(place, tmp_path, capsys):
    assert main(command(place, tmp_path, "--limit=1")) == 0
    words = [w.replace(f"{place}/one", f"{place}/two") for w in command(place, tmp_path, "--limit=1")]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "holds results of another target, other drafters or another release" in error
    assert error.splitlines()[-1].startswith("error: ")


def test_report_refuses_what_is_no_evaluation(tmp_path, capsys):
    (tmp_path / "evaluation.json").write_text(json.dumps({"format": 99}))
    for source, says in (
        (tmp_path / "nosuch", "does not exist"),
        (tmp_path, "format 99 found, 2 expected"),
        (tmp_path / "evaluation.json", "format 99 found"),
    ):
        assert main(["report", str(source)]) == 2
        error = capsys.readouterr().err
        assert says in error
        assert error.count("\n") == 1


def test_audit_refuses_in_one_line(place, tiny_cache, tmp_path, capsys):
    target = make_target(layers=10)
    tiny_drafter(target).save_pretrained(tmp_path / "deeper")
    facts = TargetFacts.from_config(target.config.to_dict(), "it", vocabulary=TargetVocabulary.from_target(target))
    export_speculators(tiny_drafter(target), tmp_path / "deepest", target=facts)
    for words, says in (
        ([str(tmp_path / "nosuch"), str(place / "one")], "nosuch does not exist"),
        ([str(tiny_cache), str(place / "nosuch")], "nosuch does not exist"),
        ([str(tiny_cache), str(tmp_path / "deeper")], "num_target_layers is 8, expected 10"),
        ([str(tiny_cache), str(tmp_path / "deepest")], "num_target_layers is 8, expected 10"),
        ([str(tiny_cache), str(place / "one"), "--documents=0"], "documents is 0"),
        ([str(tiny_cache), str(place / "one"), f"--evaluation={tmp_path}/no.json"], "no.json does not exist"),
        ([str(tiny_cache)], "drafter"),
    ):
        assert main(["audit", *words]) == 2
        error = capsys.readouterr().err
        assert says in error
        assert error.count("\n") == 1


def test_an_audit_takes_real_decoding_of_its_own_drafter_alone(place, tiny_cache, tmp_path, capsys):
    words = [w for w in command(place, tmp_path) if not w.startswith("first")]
    assert main(words) == 0
    capsys.readouterr()
    audited = ["audit", str(tiny_cache), str(place / "one"), f"--evaluation={tmp_path}", "--documents=1"]
    assert main(audited) == 2
    assert "run: second in" in capsys.readouterr().err


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{% if %}"])
def test_a_template_that_raises_is_one_line(template, place, tmp_path, capsys):
    shutil.copytree(place / "target", tmp_path / "target")
    (tmp_path / "target/chat_template.jinja").write_text(template)
    words = [w.replace(f"{place}/target", f"{tmp_path}/target") for w in command(place, tmp_path / "out")]
    assert main(words) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: the target's chat template ")


def test_an_answer_beyond_the_targets_positions_is_refused_before_any_is_decoded(place, tmp_path, capsys):
    sizes = {"vocab_size": make_target().config.vocab_size, "n_embd": 32, "n_layer": 8, "n_head": 4}
    config = GPT2Config(**sizes, n_positions=64, bos_token_id=None, eos_token_id=None)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "target")
    make_tokenizer().save_pretrained(tmp_path / "target")
    words = command(place, tmp_path / "out", f"--target={tmp_path}/target", "--limit=1")
    assert main(words) == 0
    (row,) = (tmp_path / "out/evaluation.jsonl").read_text().splitlines()
    left = 64 - json.loads(row)["prompt_tokens"]
    assert main([*words, f"--max_new_tokens={left}"]) == 0
    assert main([*words, f"--max_new_tokens={left + 1}"]) == 2
    assert f"max_new_tokens: {left + 1} behind a prompt of" in capsys.readouterr().err


def test_a_cache_of_another_target_does_not_describe_this_one(place, tiny_cache, tmp_path, capsys):
    words = command(place, tmp_path / "out", "--limit=1", f"--cache={tiny_cache}")
    assert main(words) == 0
    target = make_target(layers=10)
    target.save_pretrained(tmp_path / "target")
    make_tokenizer().save_pretrained(tmp_path / "target")
    tiny_drafter(target).save_pretrained(tmp_path / "deeper")
    others = [f"--target={tmp_path}/target", f"--out={tmp_path}/other"]
    assert main(["evaluate", str(tmp_path / "deeper"), *words[3:], *others]) == 2
    assert f"cache {tiny_cache}: num_target_layers is 8, expected 10" in capsys.readouterr().err


def test_an_audit_needs_a_decay(capsys):
    for value in ("0", "-1", ".inf"):
        assert main(["audit", "nowhere", "nothing", f"--gamma={value}"]) == 2
        assert "gamma is" in capsys.readouterr().err


@pytest.mark.parametrize(("there", "expected"), [(True, "cuda"), (False, "cpu")])
def test_decoding_takes_a_gpu_where_there_is_one(tmp_path, monkeypatch, there, expected):
    asked = []

    def load(config, device):
        asked.append(device)
        raise UserError("far enough")

    tiny_drafter(make_target()).save_pretrained(tmp_path / "drafter")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr("specauf.evaluation.cli.load_target", load)
    assert main(["evaluate", str(tmp_path / "drafter"), f"--out={tmp_path / 'out'}", "--limit=1"]) == 2
    assert asked == [expected]
