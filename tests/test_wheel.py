"""The wheel in an environment of its own, outside the repository: both commands, a tiny cache and three steps."""

import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import specauf
from tests.builder.conftest import make_target, make_tokenizer, write_jsonl

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


def run(*words: str | Path, at: Path, status: int = 0) -> str:
    """A command's output; nothing of the repository is on its path."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(w) for w in words],
        cwd=at,
        env=environment | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, f"{words[0]} {words[1]}: {done.stderr[-3000:]}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ROOT, at=folder)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def bin_of(wheel, tmp_path_factory) -> Path:
    """The commands of an environment that held nothing but pip before the wheel."""
    folder = tmp_path_factory.mktemp("installed") / "env"
    venv.create(folder, with_pip=True)
    binary = folder / ("Scripts" if os.name == "nt" else "bin")
    constraints = ROOT / "constraints.txt"
    run(binary / "python", "-m", "pip", "install", "-q", "-c", constraints, wheel, at=folder)
    return binary


def test_the_wheel_holds_configs_types_and_one_version_and_no_tests(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    shipped = {name.removeprefix("specauf/configs/") for name in names if name.startswith("specauf/configs/")}
    assert shipped == {str(p.relative_to(ROOT / "configs")) for p in (ROOT / "configs").rglob("*.yaml")}
    assert {"specauf/py.typed", "cache_builder/py.typed"} <= set(names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"specauf", "cache_builder"}
    assert wheel.name.split("-")[1] == specauf.__version__


def test_both_commands_work_where_the_repository_is_not(bin_of, tmp_path):
    assert run(bin_of / "specauf", "--version", at=tmp_path).strip() == specauf.__version__
    assert run(bin_of / "cache-builder", "--version", at=tmp_path).strip() == specauf.__version__
    assert "estimate" in run(bin_of / "cache-builder", "--help", at=tmp_path)
    assert "--trainer.max_steps" in run(bin_of / "specauf", "fit", "--help", at=tmp_path)
    where = run(bin_of / "python", "-c", "import specauf; print(specauf.__file__)", at=tmp_path)
    assert Path(where.strip()).is_relative_to(bin_of.parent)
    record = json.loads(run(bin_of / "specauf", "doctor", "--no-hub", "--json", "-", at=tmp_path))
    assert record["versions"]["specauf"] == specauf.__version__
    assert record["problems"] == []


def test_a_tiny_cache_and_three_steps(bin_of, tmp_path):
    make_target().save_pretrained(tmp_path / "target")
    make_tokenizer().save_pretrained(tmp_path / "target")
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"count to {n}"} for n in range(24)])
    run(
        bin_of / "cache-builder", "build", "--target.name=t", "--target.model=target",
        "--target.mask_token=258", "--corpus=prompts.jsonl",
        "--out=cache", "--max_new_tokens=24", "--max_length=200", "--held_out=0.2", "--max_compression=100", "--k=4",
        at=tmp_path,
    )  # fmt: skip
    fit = [
        bin_of / "specauf", "fit", "-c", "fit", "--model.loss=auf", "--model.drafter=dflash-b8", "--data.cache=cache",
        "--data.batch_size=2", "--trainer.accelerator=cpu", "--trainer.default_root_dir=run",
    ]  # fmt: skip
    run(*fit, "--trainer.max_steps=3", at=tmp_path)
    assert json.loads((tmp_path / "run/run.json").read_text())["versions"]["specauf"] == specauf.__version__
    assert (tmp_path / "run/checkpoints/last.ckpt").is_file()
    said = run(*fit, "--trainer.max_steps=3", at=tmp_path, status=2)
    assert "already holds a run" in said
    assert "Traceback" not in said
