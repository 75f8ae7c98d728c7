"""Every wrong use of tests/wrong_uses.py is one line on stderr that says what to do, status 2, and no traceback.

SPECAUF_WRITE=1 writes docs/wrong-uses.md from what is seen.
"""

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import cache_builder.cli
import specauf.cli
from specauf.drafters import DFlashDrafter, DrafterConfig
from specauf.evaluation.results import FORMAT
from tests.builder.conftest import make_target, make_tokenizer
from tests.training.conftest import tiny_cache, write_tiny_cache  # noqa: F401  (a fixture)
from tests.training.running import fit_here
from tests.wrong_uses import CASES, PAGE, page, row

ROOT = Path(__file__).parent.parent
MAIN = {"specauf": specauf.cli.main, "cache-builder": cache_builder.cli.main}


@pytest.fixture(scope="module")
def place(tiny_cache, tmp_path_factory) -> Path:  # noqa: F811
    """A directory with everything that the commands name, but for what is `nowhere`."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "configs").symlink_to(ROOT / "configs")
    shutil.copytree(tiny_cache, folder / "cache")
    write_tiny_cache(folder / "without", documents=8, features="none", sketch_rank=0)
    shutil.copytree(tiny_cache, folder / "unfinished")
    (folder / "unfinished/manifest.json").unlink()
    shutil.copytree(tiny_cache, folder / "newer")
    manifest = folder / "newer/manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 9'))
    shutil.copytree(tiny_cache, folder / "flipped")
    for shard in (0, 1, 2):
        data = folder / f"flipped/shard-0000{shard}.zarr/tokens/c/0"
        data.write_bytes(bytes([data.read_bytes()[0] ^ 1]) + data.read_bytes()[1:])
    make_target().save_pretrained(folder / "target")
    make_tokenizer().save_pretrained(folder / "target")
    target = "target:\n  name: tiny\n  model: target\n  dtype: float32\n  mask_token: 258\n"
    (folder / "target.yaml").write_text(target)
    for name, loss in (("run", "dflash-b8"), ("masked", "masked")):
        options = (f"--model.drafter={loss}", "--model.loss=auf", "--trainer.max_steps=1")
        with contextlib.redirect_stdout(io.StringIO()):
            assert fit_here(folder / "cache", folder / name, *options) == 0
    config = DrafterConfig.from_target(
        make_target(hidden_size=64).config.to_dict(),
        num_hidden_layers=1,
        block_size=8,
        taps=(1, 2, 3, 4, 5),
        mask_token_id=258,
    )
    DFlashDrafter(config).save_pretrained(folder / "wide")
    shutil.copytree(folder / "wide", folder / "broken")
    (folder / "broken/model.safetensors").write_bytes(b"no tensors")
    shutil.copytree(folder / "target", folder / "lacking")
    weights = load_file(folder / "target/model.safetensors")
    del weights["model.layers.3.mlp.up_proj.weight"]
    save_file(weights, folder / "lacking/model.safetensors", metadata={"format": "pt"})
    for name, field, value in (("mistyped", "dflash_config", "none"), ("worded", "rope_theta", "large")):
        shutil.copytree(folder / "wide", folder / name)
        raw = json.loads((folder / name / "config.json").read_text())
        (folder / name / "config.json").write_text(json.dumps(raw | {field: value}))
    (folder / "cut").mkdir()
    (folder / "cut/evaluation.json").write_text(json.dumps({"format": FORMAT}))
    (folder / "cut/evaluation.jsonl").write_text("[1]\n")
    (folder / "edited").mkdir()
    (folder / "edited/evaluation.json").write_text(json.dumps({"format": FORMAT, "runs": {"auf": {}}, "parts": [{}]}))
    (folder / "empty").mkdir()
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"count to {i}"}) + "\n" for i in range(12)))
    (folder / "broken.jsonl").write_text('{"prompt": "a"}\n{broken\n')
    (folder / "empty.jsonl").write_text("\n")
    (folder / "blank.jsonl").write_text('{"prompt": " "}\n')
    (folder / "numbers.jsonl").write_text('{"prompt": 5}\n')
    (folder / "latin.jsonl").write_bytes('{"prompt": "é"}'.encode("latin-1"))
    (folder / "data.csv").write_text("prompt\na\n")
    (folder / "broken.yaml").write_text("target: [\n")
    (folder / "resumed.yaml").write_text("ckpt_path: run/checkpoints/last.ckpt\n")
    (folder / "broken.ckpt").write_bytes(b"no checkpoint")
    return folder


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns)
        for p in folder.rglob("*")
        if p.is_file() and "configs" not in p.relative_to(folder).parts
    }


WRITE = bool(os.environ.get("SPECAUF_WRITE"))
answers: dict[str, str] = {}


@pytest.mark.parametrize("command", [c for cases in CASES.values() for c, _ in cases])
def test_one_line_and_status_2(command, place, monkeypatch, capsys):
    says = next(says for cases in CASES.values() for c, says in cases if c == command)
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for module in ("huggingface_hub.constants", "datasets.config"):
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True)  # read once, and another test may have been first
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(sys, "argv", [*sys.argv])
    before = tree(place)
    program, *words = shlex.split(command)
    status = MAIN[program](words)
    out, err = capsys.readouterr()
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert status == 2, out + err
    assert "Traceback" not in out + err
    assert len(lines) == 1, err
    assert err.rstrip().splitlines()[-1] == lines[0]
    assert says in lines[0], lines[0]
    after = tree(place)
    assert {name: after.get(name) for name in before} == before, "a wrong use changed or removed a file"
    said = lines[0].removeprefix("error: ").replace(str(place), "...")
    # The lock's file names a process, whose number has any number of digits.
    said = re.sub(r"tmp-\d+ \(\d+ bytes\)", "tmp-N (139 bytes)", said)
    # Lines of another release's files have other numbers.
    answers[command] = re.sub(r"\.py:\d+\)", ".py)", said)
    assert WRITE or row(command, answers[command]) in PAGE.read_text().splitlines()


def test_the_page_lists_them_all():
    assert sum(map(len, CASES.values())) >= 40
    if WRITE:
        PAGE.write_text(page(answers))
    answered = {command: "" for cases in CASES.values() for command, _ in cases}
    # What stands in the second column is held against each case above.
    assert re.sub(r"(?m)^(\| `.*?` \|) .* \|$", r"\1  |", PAGE.read_text()) == page(answered)
