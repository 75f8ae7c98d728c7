"""What `make` would run: names and paths alike, and no flag that the user did not ask for: a flag beats a file."""

import itertools
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from specauf.cli import main
from tests.docs.pages import ROOT, make_place

DEMO = (
    ".venv/bin/specauf fit -c configs/fit.yaml -c configs/demo.yaml --model.loss=configs/loss/{loss}.yaml "
    "--data.cache=caches/demo \\\n  --trainer.default_root_dir=runs/demo/{name} \ntouch runs/demo/{name}/done\n"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    assert shutil.which("make"), "this test runs make -n"
    return make_place(tmp_path_factory.mktemp("make") / "clone")


def printed(place: Path, *words: str) -> str:
    """All that `make -n` prints."""
    command = ["make", "-n", "--no-print-directory", *words]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def command(place: Path, *words: str) -> list[str]:
    """The words of the one command of ours."""
    (found,) = (line for line in printed(place, *words).splitlines() if line.startswith(".venv/bin/"))
    return shlex.split(found)


def options(words: list[str]) -> dict[str, str]:
    """Flags with `=`."""
    return dict(word.split("=", 1) for word in words if word.startswith("--") and "=" in word)


def following(words: list[str], flag: str) -> list[str]:
    """Every word that stands behind a flag."""
    return [after for word, after in itertools.pairwise(words) if word == flag]


@pytest.mark.parametrize("name", ["my.yaml", "dir/my.yml"])
def test_a_file_of_ones_own_is_taken_as_it_is(place, name):
    given = options(command(place, "train", f"LOSS={name}", f"DRAFTER={name}"))
    assert given["--model.loss"] == given["--model.drafter"] == name
    assert following(command(place, "cache", f"TARGET={name}", "CORPUS=prompts.jsonl"), "--config") == [name]
    assert following(command(place, "sweep", f"DRAFTER={name}"), "--drafter") == [name]


@pytest.mark.parametrize(
    ("target", "out"),
    [
        ("dir/my.yaml", "caches/my-prompts"),
        ("../my.v2.yml", "caches/my.v2-prompts"),
        ("llama-3-8b", "caches/llama-3-8b-prompts"),
        ("llama-3.1-8b-instruct", "caches/llama-3.1-8b-instruct-prompts"),
    ],
)
def test_a_cache_is_named_after_target_and_corpus(place, target, out):
    assert following(command(place, "cache", f"TARGET={target}", "CORPUS=dir/prompts.jsonl"), "--out") == [out]


def test_names_are_the_shipped_files(place):
    given = options(command(place, "train", "LOSS=auf", "DRAFTER=domino"))
    assert given["--model.loss"] == "configs/loss/auf.yaml"
    assert given["--model.drafter"] == "configs/drafter/domino.yaml"
    assert following(command(place, "cache", "TARGET=llama-3-8b"), "--config") == ["configs/target/llama-3-8b.yaml"]


def resolved(words: list[str], capsys, monkeypatch) -> dict:
    """The model that a printed command would train."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["specauf"])
    assert words[0] == ".venv/bin/specauf"
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([*words[1:], "--print_config"])
    assert ended.value.code in (0, None)
    return yaml.safe_load(capsys.readouterr().out)["model"]


@pytest.mark.parametrize(
    ("given", "loss", "block"),
    [
        ((), "auf", 16),
        (("LOSS=ce",), "ce", 16),
        (("ARGS=-c configs/recipe.yaml",), "auf-kl", 16),
        (("ARGS=-c configs/demo.yaml -c configs/recipe.yaml",), "auf-kl", 8),
        (("LOSS=decay", "ARGS=-c configs/recipe.yaml"), "decay", 16),
        (("DRAFTER=dflash", "ARGS=-c configs/demo.yaml"), "auf", 16),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_files_decide_what_the_user_did_not(place, capsys, monkeypatch, given, loss, block):
    model = resolved(command(place, "train", "CACHE=caches/x", *given), capsys, monkeypatch)
    assert model["loss"] == yaml.safe_load((ROOT / f"configs/loss/{loss}.yaml").read_text())
    assert model["drafter"]["init_args"]["block_size"] == block


def test_a_sweep_names_a_drafter_only_when_asked(place):
    assert "--drafter" not in command(place, "sweep")
    assert following(command(place, "sweep", "DRAFTER=dflash-b8"), "--drafter") == ["dflash-b8"]


@pytest.mark.parametrize("more", [(), ("LOSS=ce", "DRAFTER=domino")])
def test_the_demo_is_what_it_was(place, more):
    said = printed(place, "demo", *more)
    for name, loss in (("auf", "auf"), ("decay", "decay-b8")):
        assert DEMO.format(name=name, loss=loss) in said


def test_the_newest_finished_cache_is_trained_on(tmp_path):
    place = make_place(tmp_path / "clone")
    for when, name in enumerate(("old", "new")):
        (place / "caches" / name).mkdir(parents=True)
        (place / "caches" / name / "manifest.json").touch()
        os.utime(place / "caches" / name / "manifest.json", (when, when))
    (place / "caches/failed").mkdir()
    assert options(command(place, "train", "LOSS=auf"))["--data.cache"] == "caches/new"
    shutil.rmtree(place / "caches")
    assert "--data.cache" not in options(command(place, "train", "LOSS=auf"))
