"""`specauf sweep` on a tiny cache; its runs are processes of their own."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
import yaml

from specauf import sweep as module
from specauf.cli import main
from specauf.errors import UserError, run_command
from specauf.sigterm import sigterm_interrupts
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


def run_forked(words, said):
    """Without the imports of a fresh interpreter."""
    assert words[:3] == [sys.executable, "-m", "specauf"]
    done = forked(running.command, words[3:])
    said.write(done.stderr)
    return done.returncode


def test_a_sweep_ends_in_a_table_and_does_nothing_twice(tiny_cache, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "run_to_the_end", run_forked)
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

    def run(words, said):
        directory = next(w.partition("=")[2] for w in words if w.startswith("--trainer.default_root_dir"))
        calls.append(directory)
        if directory.endswith("decay-0") and len(calls) < 5:
            said.write("error: no memory\n")
            return 2
        record = {"best_tau": 1.5, "loss": 2.0, "seconds": 1.0}
        (module.Path(directory) / "summary.json").write_text(json.dumps(record))
        return 0

    monkeypatch.setattr(module, "run_to_the_end", run)
    assert main(command(tiny_cache, out)) == 2
    captured = capsys.readouterr()
    assert "1 of 4 runs failed" in captured.err
    assert "decay-0: no memory" in captured.err
    assert captured.err.count("\n") == 1
    assert "auf" in captured.out
    assert len(calls) == 4
    assert main(command(tiny_cache, out)) == 0
    assert len(calls) == 5


STANDS_FOR_A_TRAINING = """
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def stop(*_):
    time.sleep(0.5)  # as long as writing a checkpoint may take
    (folder / "saved").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
(folder / "started").touch()
time.sleep(60)
"""


def _stopped_by(name, folder):
    """Behind a training's start this process gets the signal."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background jobs deaf to it

    def stop():
        while not (folder / "started").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), name)

    threading.Thread(target=stop, daemon=True).start()
    with (folder / "said").open("w") as said, sigterm_interrupts():
        words = [sys.executable, "-c", STANDS_FOR_A_TRAINING, str(folder)]
        sys.exit(run_command(lambda: module.run_to_the_end(words, said)))


@pytest.mark.parametrize(("name", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_sweep_that_is_stopped_waits_until_its_training_has_saved(tmp_path, name, status):
    done = forked(_stopped_by, name, tmp_path)
    assert done.returncode == status
    assert (tmp_path / "saved").exists()
    assert "run the same command again to go on" in done.stderr


@pytest.mark.slow
def test_a_terminated_sweep_goes_on_where_it_was(tiny_cache, tmp_path):
    words = [w for w in command(tiny_cache, tmp_path / "sweep", seeds="0") if not w.startswith("--trainer.max_steps")]
    words[2] = "auf"
    started = [sys.executable, "-m", "specauf", *words]
    run = tmp_path / "sweep/auf-0"
    sweep = subprocess.Popen([*started, "--trainer.max_steps=1000000"], stderr=subprocess.PIPE, text=True)
    while not (run / "checkpoints/last.ckpt").exists():
        assert sweep.poll() is None
        time.sleep(0.1)
    sweep.terminate()
    assert sweep.communicate()[1].endswith("terminated: run the same command again to go on from here\n")
    assert sweep.returncode == 143
    assert (run / "stderr.txt").read_text().startswith("terminated: ")  # so it has come to its end
    step = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"]
    end = f"--trainer.max_steps={step + 2}"
    (run / "sweep.yaml").write_text((run / "sweep.yaml").read_text().replace("--trainer.max_steps=1000000", end))
    assert subprocess.run([*started, end], check=False).returncode == 0
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] == step + 2


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

    def __call__(self, words, said):
        self.commands.append(words)
        directory = next(w.partition("=")[2] for w in words if w.startswith("--trainer.default_root_dir"))
        (module.Path(directory) / "summary.json").write_text('{"best_tau": 1.5, "loss": 2.0, "seconds": 1.0}')
        return 0


def test_a_drafter_is_passed_on_only_when_given(tiny_cache, tmp_path, monkeypatch):
    """A flag would beat the drafter that a file names."""
    runs = Finished()
    monkeypatch.setattr(module, "run_to_the_end", runs)
    for out, more, expected in (("a", (), []), ("b", ("--drafter", "domino"), ["--model.drafter=domino"])):
        assert main(command(tiny_cache, tmp_path / out, "-c", "configs/demo.yaml", *more)) == 0
        for words in runs.commands:
            assert [word for word in words if word.startswith("--model.drafter")] == expected
        runs.commands.clear()


def test_the_cache_may_be_named_as_fit_names_it(tiny_cache, tmp_path, monkeypatch):
    runs = Finished()
    monkeypatch.setattr(module, "run_to_the_end", runs)
    monkeypatch.chdir(tmp_path)  # where no caches are
    words = [w for w in command(tiny_cache, tmp_path / "a") if not w.startswith("--cache")]
    assert main([*words, f"--data.cache={tiny_cache}"]) == 0
    for found in runs.commands:
        assert [w for w in found if w.startswith("--data.cache")] == [f"--data.cache={tiny_cache}"]


def test_a_loss_that_changed_meanwhile_is_refused(tiny_cache, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "run_to_the_end", Finished())
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
