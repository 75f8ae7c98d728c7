"""Rows and names of evaluations: which may stand beside each other, and what a report says of them."""

import json
import shutil

import torch

from specauf.cli import main
from specauf.evaluation import run as run_module
from specauf.evaluation.plots import figures
from tests.builder.conftest import make_target, make_tokenizer
from tests.evaluation.conftest import command, made_record, record_of


def test_rows_measured_elsewhere_are_refused(place, tmp_path, monkeypatch, capsys):
    assert main(command(place, tmp_path, "--limit=1")) == 0
    capsys.readouterr()
    real = run_module.environment
    monkeypatch.setattr(run_module, "environment", lambda device: real(device) | {"date": "2099-01-01"})
    assert main(command(place, tmp_path, "--limit=2")) == 0
    found = record_of(tmp_path)["environment"]["date"]
    assert found == f"{real('cpu')['date']} and 2099-01-01"
    rows, before = tmp_path / "evaluation.jsonl", (tmp_path / "evaluation.jsonl").read_text()
    monkeypatch.setattr(run_module, "environment", lambda device: real(device) | {"device": "H100"})
    capsys.readouterr()
    assert main(command(place, tmp_path)) == 2
    assert f"device: CPU in {rows} line 1, H100 now" in capsys.readouterr().err
    assert rows.read_text() == before


def test_an_evaluation_that_goes_on_tomorrow_names_today(place, tmp_path, monkeypatch, capsys):
    """Some templates print today's date around the same turn."""
    shutil.copytree(place / "target", tmp_path / "target")
    words = command(place, tmp_path / "out", f"--target={tmp_path}/target")
    turns = "{% for m in messages %}{{ m.content }}{% endfor %}"
    template = tmp_path / "target/chat_template.jinja"
    template.write_text("{{ strftime_now('%d %B') }}" + turns)
    (seen, real), place_of = ([], run_module.encode), run_module.environment
    monkeypatch.setattr(run_module, "encode", lambda *given: seen.append(real(*given)) or seen[-1])
    for day, more in (("2026-10-26", ["--limit=1"]), ("2026-10-27", [])):
        monkeypatch.setattr(run_module, "environment", lambda device, day=day: place_of(device) | {"date": day})
        assert main([*words, *more]) == 0
    assert make_tokenizer().decode(seen[0][0]).startswith("26 October")
    assert torch.equal(seen[1], seen[0])
    rows = tmp_path / "out/evaluation.jsonl"
    before = rows.read_text()
    template.write_text("As of yesterday. " + turns)
    capsys.readouterr()
    assert main(words) == 2
    assert f"prompt prompts/1: other tokens in {rows} than the tokenizer" in capsys.readouterr().err
    assert rows.read_text() == before


def test_rows_of_another_drafter_are_refused_wherever_they_stand(place, tmp_path, capsys):
    assert main(command(place, tmp_path)) == 0
    rows = tmp_path / "evaluation.jsonl"
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    lines[1]["key"] = "of another"
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(command(place, tmp_path)) == 2
    assert f"{rows} line 2 holds results of another target, other drafters" in capsys.readouterr().err


def test_json_goes_to_standard_output_alone(place, tmp_path, capsys):
    assert main(command(place, tmp_path, "--limit=1", "--json=-")) == 0
    assert json.loads(capsys.readouterr().out) == record_of(tmp_path)


def test_a_report_says_whose_prompts_are_fewer_and_that_two_targets_share_a_name(place, tmp_path, capsys):
    ours = [w for w in command(place, tmp_path / "a", "--limit=1") if not w.startswith("second")]
    theirs = [w for w in command(place, tmp_path / "b") if not w.startswith("first")]
    assert main(ours) == main(theirs) == 0
    assert main(["report", str(tmp_path / "a"), str(tmp_path / "b"), f"--out={tmp_path / 'both'}"]) == 0
    assert "prompts, greedy, 1 to 3 prompts" in (tmp_path / "both/report.md").read_text()
    make_target(seed=5).save_pretrained(tmp_path / "target")
    make_tokenizer().save_pretrained(tmp_path / "target")
    words = [
        w.replace(f"{place}/target", f"{tmp_path}/target").replace(f"{tmp_path}/b", f"{tmp_path}/c") for w in theirs
    ]
    assert main(words) == 0
    capsys.readouterr()
    assert main(["report", str(tmp_path / "a"), str(tmp_path / "c")]) == 2
    assert "report runs of one identity together" in capsys.readouterr().err
    otherwise = [word.replace(f"{place}/target", f"{place}/../{place.name}/target") for word in theirs]
    otherwise = [word.replace(f"{tmp_path}/b", f"{tmp_path}/d") for word in otherwise]
    assert main(otherwise) == 0
    early = record_of(tmp_path / "d")
    del early["identity"]["checksum"]  # as records were before there was one
    (tmp_path / "d/evaluation.json").write_text(json.dumps(early))
    assert main(["report", str(tmp_path / "a"), str(tmp_path / "d"), f"--out={tmp_path / 'same'}"]) == 0


def test_odd_names_of_drafters(place, tmp_path, capsys):
    """A path with a sign of equality, and what matplotlib would read as a formula."""
    odd = tmp_path / "lr=0.1"
    shutil.copytree(place / "one", odd)
    words = [w for w in command(place, tmp_path / "out", "--limit=1") if not w.startswith(("first", "second"))]
    words[1:1] = [str(odd), f"x$\\foo$={place}/two"]
    prompts = shutil.copy(place / "prompts.jsonl", tmp_path / "p$_{$.jsonl")
    words.append(f'--benchmarks=["{prompts}"]')
    assert main(words) == 0
    assert list(record_of(tmp_path / "out")["runs"]) == ["lr=0.1", "x$\\foo$"]
    assert main(["report", str(tmp_path / "out")]) == 0
    words[1:3] = [f"plain={odd}"]
    capsys.readouterr()
    assert main(words) == 2
    assert "drafters: plain is what decoding without a drafter is called" in capsys.readouterr().err


def test_runs_of_one_name_in_deep_directories_can_be_told_apart_in_plots_and_tables(tmp_path):
    """Whole paths would leave the plots no room, and cut ones may be equal."""
    shared, both = tmp_path / ("deep" * 20), ("first|" + "x" * 60, "second")
    for folder in both:
        (shared / folder).mkdir(parents=True)
        (shared / folder / "evaluation.json").write_text(json.dumps(made_record()))
    assert main(["report", *(str(shared / folder) for folder in both), f"--out={tmp_path}"]) == 0
    record = json.loads((tmp_path / "report.json").read_text())
    assert list(record["runs"]) == [f"{folder}/mine" for folder in both]
    assert f"| first\\|{'x' * 60}/mine | 2.000" in (tmp_path / "report.md").read_text()
    run = record["runs"]["second/mine"]
    record["parts"] = [record["parts"][0] | {"runs": {f"{'a' * 20}{middle}{'b' * 20}": run for middle in "cd"}}]
    svg = figures(record)[0].svg
    assert svg.count(f"{'a' * 15}…{'b' * 15} (2)") == svg.count(f"{'a' * 15}…{'b' * 15} -->")
