"""A run directory is whole whatever logs the run, and nothing is written elsewhere."""

import json
from pathlib import Path
from typing import ClassVar

import pytest
import yaml
from lightning.pytorch.loggers.logger import DummyLogger

from specauf.loggers import MetricsLog
from tests.training.running import fit_here, logged

OPTIONS = ("--model.loss=auf", "--trainer.max_steps=2", "--trainer.limit_val_batches=0")


class LogsHere(DummyLogger):
    """Logs to a service and has the current directory for its own files, as W&B's logger does; makes nothing."""

    seen: ClassVar[list[dict[str, float]]] = []

    def __init__(self) -> None:
        super().__init__()

    @property
    def save_dir(self) -> str:
        return "."

    def log_metrics(self, metrics, step=None) -> None:
        self.seen.append(metrics)


HERE = f"--trainer.logger={__name__}.LogsHere"
CSV = "--trainer.logger=lightning.pytorch.loggers.CSVLogger"


@pytest.mark.parametrize("logger", [[HERE], [CSV, "--trainer.logger.save_dir=csv"], ["--trainer.logger=false"]])
def test_the_run_directory_is_whole_and_no_other_is_touched(tiny_cache, tmp_path, monkeypatch, logger):
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text("mine: true\n")
    LogsHere.seen.clear()
    assert fit_here(tiny_cache, Path("runs/one"), *OPTIONS, *logger) == 0
    assert Path("config.yaml").read_text() == "mine: true\n"
    run = tmp_path / "runs/one"
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["cache"] == str(tiny_cache)
    assert json.loads((run / "run.json").read_text())["cache"] == str(tiny_cache)
    if "false" in logger[0]:
        assert not (run / "metrics.csv").exists()
    else:
        assert sorted(logged(run)) == [0, 1]
    assert bool(LogsHere.seen) == (logger == [HERE])
    others = {path.name for path in tmp_path.iterdir()} - {"runs", "config.yaml"}
    assert others == ({"csv"} if CSV in logger else set())
    assert not list(Path("csv").rglob("config.yaml"))


@pytest.mark.parametrize("preset", ["wandb", "mlflow"])
def test_a_preset_with_its_logger_put_in(tiny_cache, tmp_path, monkeypatch, preset):
    """W&B and MLflow are not installed here: the logger that stands for theirs is given in their place."""
    config = yaml.safe_load(Path(f"configs/logger/{preset}.yaml").read_text())
    (only,) = config["trainer"]["logger"]
    only.update(class_path=f"{__name__}.LogsHere", init_args={})
    file = tmp_path / "preset.yaml"
    file.write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    assert fit_here(tiny_cache, tmp_path / "run", *OPTIONS, "-c", str(file)) == 0
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"config.yaml", "run.json", "metrics.csv", "checkpoints", "summary.json"}


def test_another_csv_log_in_the_run_directory_is_refused(tiny_cache, tmp_path, capsys):
    run = tmp_path / "run"
    where = (f"--trainer.logger.save_dir={run}", "--trainer.logger.name=", "--trainer.logger.version=")
    assert fit_here(tiny_cache, run, *OPTIONS, CSV, *where) == 2
    err = capsys.readouterr().err
    assert "where every run writes metrics.csv: leave it out" in err
    assert err.count("\n") == 1


EVERY_3 = ("--model.full_block_every=3", "--trainer.max_steps=8")


@pytest.mark.parametrize(
    ("options", "measured"),
    [
        (["--model.loss=auf", *EVERY_3], [2, 5]),
        (["--model.loss=auf", *EVERY_3, "--trainer.log_every_n_steps=4"], [2, 5]),
        (["--model.loss=auf", *EVERY_3, "--trainer.accumulate_grad_batches=2"], [2, 5]),
        (["--model.loss=decay", *EVERY_3, "--trainer.log_every_n_steps=4"], [2, 3, 5, 7]),
        # Its first steps look at every slot in any case.
        (["--model.loss=auf-warmup", "--model.loss.weighting.warmup_steps=2", *EVERY_3], [0, 1, 2, 5]),
    ],
    ids=["auf", "logged-less-often", "accumulated", "every-slot", "at-first"],
)
def test_token_accuracy_is_logged_where_it_was_measured(tiny_cache, tmp_path, monkeypatch, options, measured):
    LogsHere.seen.clear()
    assert fit_here(tiny_cache, tmp_path, "--trainer.limit_val_batches=0", *options, HERE) == 0
    assert sorted(logged(tmp_path, "train/token_accuracy")) == measured
    assert sum("train/token_accuracy" in metrics for metrics in LogsHere.seen) == len(measured)


@pytest.mark.filterwarnings("ignore:Experiment logs directory")
def test_an_old_log_takes_no_name_that_is_taken(tmp_path):
    before = {"metrics-2.csv": "old\n", "metrics-10.csv": "older\n", "metrics-mine.csv": "mine\n"}
    for name, text in before.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "metrics.csv").write_text("newest\n")
    log = MetricsLog(tmp_path)
    log.log_metrics({"a": 1.0}, 0)
    log.save()
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found.pop("metrics.csv").startswith("a,step")
    assert found == before | {"metrics-11.csv": "newest\n"}
