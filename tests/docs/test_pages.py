"""README and docs: every block runs or says why not, every link resolves, every named path exists, the site builds."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

from tests.docs.pages import PAGES, ROOT, blocks, make_place, shell

EXTENDING = ROOT / "docs/extending"
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
NAMED = re.compile(r"`((?:specauf|cache_builder|configs|tests|benchmarks|studies|docs)/[\w./-]+)`")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_block_runs_or_says_why_not(page):
    silent = [str(b) for b in blocks(page) if b.mark is None and b.kind == "indented"]
    if page.parent != EXTENDING:  # which test_extending.py follows whole
        silent += [str(b) for b in blocks(page) if b.mark is None and b.kind not in ("indented", "{toctree}")
                   and not b.kind.startswith("{eval-rst}")]  # fmt: skip
    assert silent == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_and_named_paths_are_there(page):
    text = re.sub(r"(?m)^    .*$", "", page.read_text())  # links in code are no links
    missing = []
    for link in LINK.findall(text):
        path, _, anchor = unquote(link).partition("#")
        if "://" in link or link.startswith("mailto:"):
            continue
        target = page if not path else (page.parent / path).resolve()
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in headings(target)):
            missing.append(link)
    missing += [name for name in NAMED.findall(text) if not any(ROOT.glob(name.rstrip("/")))]
    assert missing == []


def headings(page: Path) -> set[str]:
    """Anchors that a page's headings make, as GitHub and MyST name them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_site_builds_without_warnings(tmp_path):
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "-W",
        "--keep-going",
        "-d",
        tmp_path / "trees",
        ROOT / "docs",
        tmp_path / "site",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "accept_until_fail" in (tmp_path / "site/api.html").read_text()


RUN = [page for page in PAGES if any(b.mark == "run" for b in blocks(page))]


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_page_s_commands_run(page, tmp_path):
    """One after another, as a reader would, in a place like a clone that holds the demo's cache and runs."""
    place = make_place(tmp_path / "clone")
    rows = [json.dumps({"prompt": f"Write a function that adds {n} to a number."}) + "\n" for n in range(40)]
    (place / "prompts.jsonl").write_text("".join(rows))
    for name in ("caches/demo", "runs/demo"):
        if not (ROOT / name).is_dir():
            pytest.skip(f"{name} is not here: make demo")
        shutil.copytree(ROOT / name, place / name)
    for block in blocks(page):
        if block.mark == "run":
            shell(f"python - <<'END'\n{block.text}END\n" if block.kind == "python" else block.text, place)
