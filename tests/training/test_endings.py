"""A run that ends early says why and how to go on, in one line: Ctrl-C, wrong settings, a checkpoint that is gone."""

import json
import math
import shutil

import pytest
import torch

import specauf.module
from specauf.cli import main
from specauf.drafters import DrafterConfig
from specauf.errors import UserError
from specauf.progress import progress
from specauf.schedules import Constant, WarmupCosine, WarmupStableDecay
from tests.training.running import fit, fit_here

INTERRUPTED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # what starts in the background may ignore it
from specauf.callbacks import Throughput
from specauf.cli import main
end = Throughput.on_train_batch_end
def stop(self, trainer, *rest):
    end(self, trainer, *rest)
    if trainer.global_step == STEP:
        os.kill(os.getpid(), signal.SIGNAL)
Throughput.on_train_batch_end = stop
sys.exit(main())
"""
# 4 steps an epoch.
OPTIONS = (
    "--model.loss=auf",
    "--trainer.max_epochs=2",
    "--trainer.limit_val_batches=0",
    "--checkpoints.every_n_steps=3",
)
ENDLESS = ("--model.loss=auf", "--trainer.max_epochs=-1", "--trainer.max_time=00:00:01:00")


@pytest.fixture(scope="module")
def ended(tiny_cache, tmp_path_factory):
    """A run that has ended, with a best and a last checkpoint."""
    run = tmp_path_factory.mktemp("ended") / "run"
    assert fit_here(tiny_cache, run, "--model.loss=auf", "--trainer.max_steps=4") == 0
    return run


def errors(err: str) -> list[str]:
    return [line for line in err.replace("\r", "\n").splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize(("signal", "status", "word"), [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "terminated")])
def test_a_signal_says_how_to_go_on(tiny_cache, tmp_path, signal, status, word):
    run = tmp_path / "run"
    stopped = fit(tiny_cache, run, *OPTIONS, code=INTERRUPTED.replace("STEP", "6").replace("SIGNAL", signal))
    assert stopped.returncode == status, stopped.stderr
    assert "Traceback" not in stopped.stderr
    option = f"--ckpt_path={run}/checkpoints/last.ckpt"
    assert stopped.stderr.splitlines()[-1] == f"{word}: run the same command with {option} to go on"
    assert fit_here(tiny_cache, run, *OPTIONS, option) == 0
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 8


def test_ctrl_c_before_the_first_checkpoint_says_so(tiny_cache, tmp_path):
    code = INTERRUPTED.replace("STEP", "2").replace("SIGNAL", "SIGINT")
    stopped = fit(tiny_cache, tmp_path / "run", *OPTIONS, code=code)
    assert stopped.returncode == 130, stopped.stderr
    said = "interrupted before the first checkpoint: run the same command again to start anew"
    assert stopped.stderr.splitlines()[-1] == said
    assert fit_here(tiny_cache, tmp_path / "run", *OPTIONS) == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (ENDLESS, "trainer.max_steps is -1 and so is trainer.max_epochs, but model.schedule WarmupCosine"),
        (
            (*ENDLESS, "--model.schedule=Constant", "--model.drafter=domino"),
            "trainer.max_steps is -1 and so is trainer.max_epochs, but the domino drafter's base_ratio",
        ),
        (("--trainer.val_check_interval=9",), "trainer: `val_check_interval` (9) must be less than or equal"),
        (("--trainer.check_val_every_n_epoch=0",), "trainer.check_val_every_n_epoch is 0: give at least 1"),
        (("--trainer.val_check_interval=0",), "trainer.val_check_interval is 0: give at least 1 batch, or "),
        (
            ("--trainer.callbacks+=Timer", "--trainer.callbacks.duration=00:00:00:01"),
            "trainer: Does not validate against any of the Union subtypes",
        ),
        (
            ("--trainer.callbacks+=ModelPruning", "--trainer.callbacks.pruning_fn=l1_unstructured"),
            "trainer.callbacks: ModelPruning found, which would prune nothing",
        ),
        (("--trainer.callbacks+=BackboneFinetuning",), "trainer.callbacks: BaseFinetuning found, which would freeze"),
        (
            ("--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/tua", "--trainer.max_epochs=1"),
            "trainer: Early stopping conditioned on metric `val/tua` which is not available",
        ),
        (
            ("-c", "configs/trainer/early-stopping.yaml", "--trainer.limit_val_batches=0"),
            "trainer.callbacks: EarlyStopping monitors val/tau, but trainer.limit_val_batches is 0",
        ),
        (("--trainer.callbacks+=LearningRateFinder",), "trainer.callbacks: LearningRateFinder found"),
        (("--model.drafter.init_args.attention=flex",), "model.drafter.init_args.attention is flex but this trains on"),
        (("--model.drafter.init_args.intermediate_size=0",), "intermediate_size: 0 found, at least 1 expected"),
        (("--ckpt_path=last",), "--ckpt_path=last but "),
        (("--ckpt_path=best",), "--ckpt_path=best but "),
        (("--ckpt_path=RUN/checkpoints/last",), "/checkpoints/last does not exist: give RUN/checkpoints/last.ckpt"),
        (("--ckpt_path=EMPTY",), "holds no checkpoints/last.ckpt: give a run directory or a .ckpt file"),
        (("--ckpt_path=EMPTY/text",), "cannot be read"),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else "",
)
def test_a_wrong_setting_is_one_line(tiny_cache, tmp_path, ended, capsys, options, says):
    empty = tmp_path / "empty"
    empty.mkdir()
    if "EMPTY/text" in options[0]:
        (empty / "text").write_text("no checkpoint")
    words = [word.replace("RUN", str(ended)).replace("EMPTY", str(empty)) for word in options]
    capsys.readouterr()
    assert fit_here(tiny_cache, tmp_path / "run", "--model.loss=auf", *words) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert len(errors(err)) == 1, err
    assert says in errors(err)[0]
    assert not list(tmp_path.glob("run/checkpoints/*.ckpt")) or "val/tua" in says  # that one is seen after an epoch


def test_what_lightning_refuses_names_the_place(tiny_cache, tmp_path, capsys):
    assert fit_here(tiny_cache, tmp_path / "run", "--model.loss=auf", "--trainer.val_check_interval=9") == 2
    said = errors(capsys.readouterr().err)[0]
    assert "(lightning/pytorch/loops/fit_loop.py:" in said
    assert said.endswith("correct that --trainer option or callback")


@pytest.mark.parametrize("kind", [ValueError, RuntimeError, AttributeError])
def test_an_error_of_our_own_keeps_its_traceback(tiny_cache, tmp_path, monkeypatch, kind):
    def broken(*args, **options):
        raise kind("ours")

    monkeypatch.setattr(specauf.module, "branch_losses", broken)
    with pytest.raises(kind, match="ours"):
        fit_here(tiny_cache, tmp_path / "run", *OPTIONS)


def test_the_end_of_another_rank_is_one_line(tiny_cache, tmp_path, monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:8344. GLHF!")

    monkeypatch.setattr(specauf.module, "branch_losses", broken)
    with pytest.raises(SystemExit, match=r"^error: another rank has ended, whose own message says why: [^\n]*$"):
        fit_here(tiny_cache, tmp_path / "run", *OPTIONS)


def test_a_single_callback_is_a_list_of_one(tiny_cache, tmp_path):
    options = ("--trainer.callbacks=LearningRateMonitor", "--trainer.max_steps=1")
    assert fit_here(tiny_cache, tmp_path / "run", *OPTIONS, *options) == 0
    assert "lr-AdamW" in (tmp_path / "run/metrics.csv").read_text().splitlines()[0]
    assert (tmp_path / "run/summary.json").is_file()  # ours are still there


@pytest.mark.parametrize("bar", ["--trainer.enable_progress_bar=false", "--trainer.callbacks+=RichProgressBar"])
def test_a_bar_may_be_switched_off_or_be_another(tiny_cache, tmp_path, bar):
    assert fit_here(tiny_cache, tmp_path / "run", *OPTIONS, "--trainer.max_steps=1", bar) == 0


def test_the_order_of_batches_is_ours_whatever_a_file_leaves_out(tiny_cache, tmp_path):
    options = ("--trainer.use_distributed_sampler=true", "--trainer.strategy=ddp", "--trainer.max_steps=1")
    assert fit_here(tiny_cache, tmp_path / "run", *OPTIONS, *options) == 0


@pytest.mark.parametrize("given", ["RUN", "RUN/checkpoints", "last"])
def test_a_run_directory_means_its_last_checkpoint(tiny_cache, tmp_path, ended, given):
    run = tmp_path / "run"
    shutil.copytree(ended, run)
    word = f"--ckpt_path={given.replace('RUN', str(run))}"
    assert fit_here(tiny_cache, run, "--model.loss=auf", "--trainer.max_steps=4", word) == 0
    (run / "checkpoints/last.ckpt").unlink()
    assert fit_here(tiny_cache, run, "--model.loss=auf", "--trainer.max_steps=4", word) == 2


def test_time_alone_may_end_a_run_at_a_constant_rate(tiny_cache, tmp_path, capsys):
    options = ("--trainer.max_time=00:00:00:02", "--model.schedule=Constant", "--checkpoints.every_n_steps=2")
    run = tmp_path / "run"
    assert fit_here(tiny_cache, run, *ENDLESS, *options) == 0
    steps = json.loads((run / "summary.json").read_text())["steps"]
    assert steps > 0
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] == steps
    assert fit_here(tiny_cache, run, *ENDLESS, *options, f"--ckpt_path={run}") == 0
    assert "raise trainer.max_epochs, max_steps or max_time to go on" in capsys.readouterr().out


def test_no_limit_is_refused_by_schedules_that_need_one():
    for schedule in (WarmupCosine(), WarmupStableDecay()):
        schedule.require_length(100)
        with pytest.raises(UserError, match=r"max_steps is -1 .* --trainer.max_steps=N, or --model.schedule=Constant"):
            schedule.require_length(math.inf)
    schedule = Constant(warmup_steps=2)
    schedule.require_length(math.inf)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    assert schedule.build(optimizer, math.inf).get_last_lr() == [0.5]


def test_progress_without_end_shows_what_was_done(capsys, monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr("specauf.progress.SECONDS_BETWEEN_LINES", 0.0)
    with progress("training", math.inf, unit="steps") as advance:
        advance(3, note="loss 1.000")
    said = capsys.readouterr().err
    assert said.startswith("training: 3 steps, ")
    assert "inf" not in said
    assert "left" not in said
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with progress("training", math.inf, unit="steps") as advance:
        advance(3)
    assert "inf" not in capsys.readouterr().err


def test_a_drafter_without_an_mlp_is_refused():
    shape = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
    rest = {
        "vocab_size": 9,
        "num_target_layers": 4,
        "taps": (1,),
        "block_size": 4,
        "mask_token_id": 8,
        "feature_dim": 8,
    }
    with pytest.raises(UserError, match="intermediate_size: 0 found, at least 1 expected"):
        DrafterConfig(**shape, **rest, intermediate_size=0)


def test_validate_takes_the_best_of_a_run_directory(tiny_cache, tmp_path, ended, capsys):
    run = tmp_path / "run"
    shutil.copytree(ended, run)
    words = ["validate", "-c", f"{run}/config.yaml", f"--ckpt_path={run}"]
    assert main(words) == 0
    (run / "checkpoints/last.ckpt").unlink()  # it is not the one that is read
    assert main(words) == 0
    (run / "checkpoints/best.ckpt").unlink()
    assert main(words) == 2
    assert f"--ckpt_path={run} holds no checkpoints/last.ckpt" in capsys.readouterr().err
