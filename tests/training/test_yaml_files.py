"""Every YAML file in configs/ does what its first line says: parsed, instantiated and, where a CPU can, run."""

from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import EMAWeightAveraging

from cache_builder.commands import parse_build
from specauf.cache import open_cache
from specauf.checkpoint import load_checkpoint, load_drafter
from specauf.drafters import Drafter, DrafterSpec
from specauf.evaluation.settings import make_settings
from specauf.objectives import Objective
from specauf.targets import TargetConfig, resolve_target
from tests.drafters.test_losses import objective_of
from tests.training.running import fit_here, logged

CONFIGS = Path("configs")
FILES = sorted(CONFIGS.rglob("*.yaml"))
# Run by `specauf fit`, with what keeps them short.
FIT = {
    "fit.yaml": [],
    "demo.yaml": ["--model.head_tokens=64"],
    "recipe.yaml": [],
    "train.yaml": [],
    "trainer/ddp.yaml": ["--trainer.accelerator=cpu", "--trainer.devices=1"],
    "trainer/early-stopping.yaml": [],
    "trainer/ema.yaml": [],
    "debug/overfit.yaml": ["--data.batch_size=1"],
    "debug/fast.yaml": [],
}
# What this machine lacks, and the one line that says so.
LACKS = {"logger/wandb.yaml": "wandb", "logger/mlflow.yaml": "mlflow"}


def names(kind: str) -> list[str]:
    return [file.stem for file in FILES if file.parent.name == kind]


def test_no_file_is_left_out():
    known = {"loss", "drafter", "target", "corpus"}
    others = {str(f.relative_to(CONFIGS)) for f in FILES if f.parent.name not in known}
    assert others == {*FIT, *LACKS, "demo-cache.yaml", "demo-evaluate.yaml"}


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(CONFIGS)))
def test_opens_with_the_command_that_uses_it(file):
    first = file.read_text().splitlines()[0]
    assert first.startswith(("# make ", "# specauf ", "# cache-builder "))


@pytest.mark.parametrize("name", FIT)
def test_fit_runs_with_it(name, tiny_cache, tmp_path):
    options = ["-c", f"configs/{name}", "--model.loss=auf", "--trainer.max_steps=2", *FIT[name]]
    options.append("--trainer.log_every_n_steps=1")
    assert fit_here(tiny_cache, tmp_path / "run", *options) == 0
    if name != "debug/fast.yaml":  # which writes nothing
        assert sorted(logged(tmp_path / "run")) == [0, 1]


def test_the_recipe_names_its_loss(tiny_cache, tmp_path):
    files = ["-c", "configs/demo.yaml", "-c", "configs/recipe.yaml"]
    assert fit_here(tiny_cache, tmp_path / "run", *files, "--model.head_tokens=64", "--trainer.max_steps=1") == 0
    ran = yaml.safe_load((tmp_path / "run/config.yaml").read_text())["model"]
    assert ran["loss"] == yaml.safe_load((CONFIGS / "loss/auf-kl.yaml").read_text())
    assert ran["optimizer"]["class_path"].endswith("MuonAdamW")


def test_presets_with_callbacks_add_up(tiny_cache, tmp_path):
    files = ["-c", "configs/trainer/early-stopping.yaml", "-c", "configs/trainer/ema.yaml"]
    assert fit_here(tiny_cache, tmp_path / "run", *files, "--model.loss=auf", "--trainer.max_steps=1") == 0
    saved = yaml.safe_load((tmp_path / "run/config.yaml").read_text())["trainer"]["callbacks"]
    assert [c["class_path"].split(".")[-1] for c in saved] == ["EarlyStopping", "EMAWeightAveraging"]


def test_averaged_weights_are_what_is_saved(tiny_cache, tmp_path):
    options = ["--model.loss=auf", "--trainer.max_steps=3", "--model.optimizer.init_args.lr=1.0e-2"]
    assert fit_here(tiny_cache, tmp_path / "plain", *options) == 0
    assert fit_here(tiny_cache, tmp_path / "ema", *options, "-c", "configs/trainer/ema.yaml") == 0
    plain, mean = (load_checkpoint(tmp_path / run / "checkpoints/last.ckpt") for run in ("plain", "ema"))
    assert logged(tmp_path / "plain") == logged(tmp_path / "ema")  # the mean does not feed back
    name = "drafter.fc.weight"
    trained = mean["current_model_state"][name]
    torch.testing.assert_close(trained, plain["state_dict"][name], rtol=0, atol=0)
    assert (mean["state_dict"][name] - trained).abs().max() > 1e-3
    assert isinstance(load_drafter(tmp_path / "ema"), Drafter)


def test_the_average_has_the_target_s_own_buffers(tiny_cache, tmp_path, monkeypatch):
    averaged = []

    def spied(decay):
        def mean(average, current, count):
            averaged.append(current.shape)
            return average + (1 - decay) * (current - average)

        return mean

    seen, end = [], EMAWeightAveraging.on_train_end

    def spied_end(self, trainer, module):
        seen.append((dict(self._average_model.module.named_buffers()), dict(module.named_buffers())))
        end(self, trainer, module)
        seen.append(dict(module.named_parameters()))

    monkeypatch.setattr("lightning.pytorch.callbacks.weight_averaging.get_ema_avg_fn", spied)
    monkeypatch.setattr(EMAWeightAveraging, "on_train_end", spied_end)
    options = ("--model.loss=auf", "--trainer.max_steps=2", "--model.head_tokens=64")
    assert fit_here(tiny_cache, tmp_path, *options, "-c", "configs/trainer/ema.yaml") == 0
    (average, own), trained = seen
    assert {"vocabulary.embedding", "head_vocabulary.embedding"} <= own.keys() == average.keys()
    assert all(torch.equal(value, average[name]) for name, value in own.items())
    # The first step is copied, the second averaged: the trained weights and nothing else.
    assert sorted(averaged) == sorted(value.shape for value in trained.values())


@pytest.mark.parametrize("name", LACKS)
def test_what_cannot_run_here_says_so(name, tiny_cache, tmp_path, capsys):
    assert fit_here(tiny_cache, tmp_path / "run", "-c", f"configs/{name}", "--model.loss=auf") == 2
    said = capsys.readouterr().err
    assert LACKS[name] in said.lower()
    assert said.count("\n") == 1


@pytest.mark.parametrize("name", names("loss"))
def test_losses(name):
    assert isinstance(objective_of(name), Objective)


@pytest.mark.parametrize("name", names("drafter"))
def test_drafters(name, tiny_cache):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(DrafterSpec, "drafter")
    spec = parser.instantiate(parser.parse_args([f"--drafter=configs/drafter/{name}.yaml"])).drafter
    cache = open_cache(str(tiny_cache))
    assert isinstance(spec.build(cache.manifest, cache.target), Drafter)


@pytest.mark.parametrize("name", names("target"))
def test_targets(name):
    found = resolve_target(name)
    assert isinstance(found, TargetConfig)
    assert found.mask_token is not None


def test_the_demo_s_cache_and_evaluation():
    config, _ = parse_build(["--config=smollm2-135m", "--config=configs/demo-cache.yaml", "--out=x"])
    assert config.corpus == "python-stdlib"
    values = yaml.safe_load((CONFIGS / "demo-evaluate.yaml").read_text())
    assert make_settings(values["max_new_tokens"], [0.0], values["block_sizes"], None, None, "rejection", 0)
