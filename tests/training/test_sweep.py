"""`specauf sweep` on a tiny cache; its runs are processes of their own."""

import json
import shutil
import sys

import pytest
import yaml

from specauf import sweep as module
from specauf.cli import main
from specauf.errors import UserError
from specauf.sweep import plan, summarise, table
from tests.processes import forked
from tests.training import running


def command(cache, out, *more, seeds="0 1"):
    return [
        "sweep", "--losses", "decay auf", "--seeds", seeds, f"--out={out}", f"--cache={cache}", f"--json={out}.json",
        "--trainer.max_steps=2", "--trainer.val_check_interval=2",
        "--data.batch_size=4", "--data.anchors_per_document=2", "--trainer.accelerator=cpu",
        *more,
    ]  # fmt: skip


def run_forked(words, stdout, stderr, check):
    """In place of subprocess.run: without the imports of a fresh interpreter."""
    assert words[:3] == [sys.executable, "-m", "specauf"]
    done = forked(running.command, words[3:])
    stderr.write(done.stderr)
    return done


def test_a_sweep_ends_in_a_table_and_does_nothing_twice(tiny_cache, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module.subprocess, "run", run_forked)
    out = tmp_path / "sweep"
    assert main(command(tiny_cache, out, seeds="0")) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["loss", "runs", "tau", "sd", "min", "max", "seconds"]
    assert sorted((line[0], line[1]) for line in lines[1:]) == [("auf", "1"), ("decay", "1")]
    found = json.loads((tmp_path / "sweep.json").read_text())["losses"]
    assert found["auf"]["tau_mean"] == found["auf"]["by_seed"]["0"]["best_tau"]
    before = {d.name: (d / "summary.json").stat().st_mtime_ns for d in out.iterdir()}
    assert set(before) == {"auf-0", "decay-0"}
    shutil.rmtree(out / "auf-0")
    assert main(command(tiny_cache, out, seeds="0")) == 0
    after = {d.name: (d / "summary.json").stat().st_mtime_ns for d in out.iterdir()}
    assert {name for name in after if after[name] != before[name]} == {"auf-0"}
    assert main(command(tiny_cache, out, "--data.window=2", seeds="0")) == 2
    assert "choose another --out" in capsys.readouterr().err


def test_a_failed_run_is_reported_at_the_end_and_tried_again(tiny_cache, tmp_path, capsys, monkeypatch):
    out, calls = tmp_path / "sweep", []

    class Done:
        def __init__(self, returncode):
            self.returncode = returncode

    def run(words, stdout, stderr, check):
        directory = next(w.partition("=")[2] for w in words if w.startswith("--trainer.default_root_dir"))
        calls.append(directory)
        if directory.endswith("decay-0") and len(calls) < 5:
            stderr.write("error: no memory\n")
            return Done(2)
        record = {"best_tau": 1.5, "loss": 2.0, "seconds": 1.0}
        (module.Path(directory) / "summary.json").write_text(json.dumps(record))
        return Done(0)

    monkeypatch.setattr(module.subprocess, "run", run)
    assert main(command(tiny_cache, out)) == 2
    captured = capsys.readouterr()
    assert "1 of 4 runs failed" in captured.err
    assert "decay-0: no memory" in captured.err
    assert captured.err.count("\n") == 1
    assert "auf" in captured.out
    assert len(calls) == 4
    assert main(command(tiny_cache, out)) == 0
    assert len(calls) == 5


def test_a_begun_run_goes_on_from_its_checkpoint(tmp_path):
    (run,) = plan("auf", "3", tmp_path)
    assert not any(word.startswith("--ckpt_path") for word in run.command([]))
    (run.directory / "checkpoints").mkdir(parents=True)
    (run.directory / "checkpoints/last.ckpt").touch()
    assert run.command(["--x=1"])[-1] == f"--ckpt_path={run.directory}/checkpoints/last.ckpt"


def test_seeds_are_averaged(tmp_path):
    runs = plan("auf", "0 1", tmp_path)
    for run, tau in zip(runs, (1.5, 2.5), strict=True):
        run.directory.mkdir()
        (run.directory / "summary.json").write_text(json.dumps({"best_tau": tau, "loss": 2.0, "seconds": 1.0}))
    assert table(summarise(runs)).splitlines()[1].split() == ["auf", "2", "2.000", "0.707", "1.500", "2.500", "1.0"]


def test_one_run_has_no_spread_and_none_has_no_mean(tmp_path):
    runs = plan("auf decay", "0", tmp_path)
    runs[0].directory.mkdir()
    (runs[0].directory / "summary.json").write_text(json.dumps({"best_tau": 1.5, "loss": 2.0, "seconds": 1.0}))
    rows = [line.split() for line in table(summarise(runs)).splitlines()[1:]]
    assert rows == [["auf", "1", "1.500", "-", "1.500", "1.500", "1.0"], ["decay", "0", "-", "-", "-", "-", "-"]]


@pytest.mark.parametrize(
    ("losses", "seeds", "says"),
    [
        ("nosuch", "0", "unknown loss"),
        ("auf auf", "0", "--losses"),
        ("auf configs/loss/auf.yaml", "0", "--losses: auf and configs/loss/auf.yaml are both called auf"),
        ("auf", "x", "'x' is no seed"),
        ("", "0", "--losses"),
    ],
)
def test_wrong_plans_are_refused(tmp_path, losses, seeds, says):
    with pytest.raises(UserError, match=says):
        plan(losses, seeds, tmp_path)


class Finished:
    """Stands for a run's process: writes its summary, and keeps the command."""

    def __init__(self):
        self.commands = []

    def __call__(self, words, stdout, stderr, check):
        self.commands.append(words)
        directory = next(w.partition("=")[2] for w in words if w.startswith("--trainer.default_root_dir"))
        (module.Path(directory) / "summary.json").write_text('{"best_tau": 1.5, "loss": 2.0, "seconds": 1.0}')
        return type("Done", (), {"returncode": 0})


def test_a_drafter_is_passed_on_only_when_given(tiny_cache, tmp_path, monkeypatch):
    """A flag would beat the drafter that a file names."""
    runs = Finished()
    monkeypatch.setattr(module.subprocess, "run", runs)
    for out, more, expected in (("a", (), []), ("b", ("--drafter", "domino"), ["--model.drafter=domino"])):
        assert main(command(tiny_cache, tmp_path / out, "-c", "configs/demo.yaml", *more)) == 0
        for words in runs.commands:
            assert [word for word in words if word.startswith("--model.drafter")] == expected
        runs.commands.clear()


def test_the_cache_may_be_named_as_fit_names_it(tiny_cache, tmp_path, monkeypatch):
    runs = Finished()
    monkeypatch.setattr(module.subprocess, "run", runs)
    monkeypatch.chdir(tmp_path)  # where no caches are
    words = [w for w in command(tiny_cache, tmp_path / "a") if not w.startswith("--cache")]
    assert main([*words, f"--data.cache={tiny_cache}"]) == 0
    for found in runs.commands:
        assert [w for w in found if w.startswith("--data.cache")] == [f"--data.cache={tiny_cache}"]


def test_a_loss_that_changed_meanwhile_is_refused(tiny_cache, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module.subprocess, "run", Finished())
    (tmp_path / "alt").mkdir()
    loss, out = tmp_path / "alt/decay.yaml", tmp_path / "sweep"
    shutil.copy("configs/loss/decay.yaml", loss)
    again = [word if word != "decay auf" else f"{loss} auf" for word in command(tiny_cache, out)]
    assert main(again) == 0
    kept = yaml.safe_load((out / "decay-0/sweep.yaml").read_text())
    assert kept["loss"] == yaml.safe_load(loss.read_text())
    assert main(again) == 0
    assert main(command(tiny_cache, out)) == 0  # the shipped one says the same
    capsys.readouterr()
    loss.write_text(loss.read_text().replace("gamma: 7.0", "gamma: 3.0"))
    assert main(again) == 2
    err = capsys.readouterr().err
    assert f"{loss} has init_args.weighting.init_args.gamma 3.0, {out}/decay-0 was run with 7.0: choose another" in err
    assert err.count("\n") == 1
    old = out / "decay-0/sweep.yaml"
    old.write_text(yaml.safe_dump({"options": kept["options"]}))  # as early versions wrote it
    (out / "decay-1/sweep.yaml").write_text(old.read_text())
    assert main(again) == 0


def test_what_the_sweep_sets_itself_is_refused(tiny_cache, tmp_path, capsys):
    assert main(command(tiny_cache, tmp_path / "sweep", "--seed_everything=3")) == 2
    assert "give --losses, --seeds and --out" in capsys.readouterr().err
