"""A run directory is whole whatever logs the run, and nothing is written elsewhere."""

import json
from pathlib import Path
from typing import ClassVar

import pytest
import yaml
from lightning.pytorch.loggers.logger import DummyLogger

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
