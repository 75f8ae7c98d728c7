"""Each page on extending specauf is followed to the letter, in a copy of the sources."""

import compileall
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.builder.conftest import make_target, make_tokenizer
from tests.docs.pages import ROOT, Block, blocks, shell

PAGES = sorted((ROOT / "docs/extending").glob("*.md"))
SOURCES = ("specauf", "cache_builder", "configs")


def follow(block: Block, folder: Path) -> None:
    """Do what one block says."""
    first, _, rest = block.text.partition("\n")
    if block.kind == "sh":
        shell(block.text, folder, PYTHONPATH=str(folder))
    elif block.kind == "diff":
        command = ["git", "apply", "--recount", "--unidiff-zero", "--whitespace=nowarn", "-"]
        done = subprocess.run(command, cwd=folder, input=block.text, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{block}: {done.stderr}"
    elif block.kind in ("python", "yaml"):
        file = folder / first.removeprefix("# ")
        file.parent.mkdir(parents=True, exist_ok=True)
        assert not file.exists(), f"{block}: {file} is there already"
        file.write_text(rest)
    else:
        assert block.kind == "json", f"{block}: {block.kind or 'no language'}"


@pytest.fixture
def sources(tmp_path):
    for name in SOURCES:
        shutil.copytree(ROOT / name, tmp_path / name)  # and what is compiled, which keeps its date
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_what_the_page_writes_fits_the_sources(page, sources):
    found = blocks(page)
    assert "sh" in {block.kind for block in found}
    for block in found:
        if block.kind != "sh":
            follow(block, sources)
    assert compileall.compile_dir(sources, quiet=1)


# The other walks start five interpreters, for seconds each.
@pytest.mark.parametrize(
    "page", [pytest.param(p, id=p.stem, marks=[pytest.mark.slow] if p.stem != "loss" else []) for p in PAGES]
)
def test_the_page_can_be_followed(page, tiny_cache, sources):
    shutil.copytree(tiny_cache, sources / "cache")
    make_target().save_pretrained(sources / "target")
    make_tokenizer().save_pretrained(sources / "target")
    (sources / "target.yaml").write_text(
        "target:\n  name: tiny\n  model: target\n  dtype: float32\n  mask_token: 258\n"
    )
    for block in blocks(page):
        follow(block, sources)
