"""The code blocks of README and docs, and a place to run them in.

A block is fenced, or indented by four spaces after a blank line. Above an indented one stands a comment, `<!-- run -->`
or `<!-- not run: REASON -->`. Fenced ones speak for themselves: a file whose first line names it, a diff, or commands.
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
MARK = re.compile(r"<!-- (run|not run: .{8,}) -->")


@dataclass(frozen=True)
class Block:
    """One code block.

    Attributes:
        page: file it stands in.
        line: its first line.
        kind: language of a fenced block; "indented" otherwise.
        text: without fence and indentation.
        mark: "run", "not run: ..." or None.
    """

    page: Path
    line: int
    kind: str
    text: str
    mark: str | None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """All code blocks of a page, in order."""
    found: list[Block] = []
    lines = page.read_text().split("\n")
    mark: str | None = None
    number = 0
    while number < len(lines):
        line = lines[number]
        comment = MARK.fullmatch(line.strip())
        if comment:
            mark = comment[1]
        elif line.startswith("```"):
            end = lines.index("```", number + 1)
            found.append(Block(page, number + 1, line[3:].strip(), "\n".join(lines[number + 1 : end]) + "\n", mark))
            number, mark = end, None
        elif line.startswith("    ") and not lines[number - 1].strip():
            end = number
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            text = "\n".join(part[4:] for part in lines[number:end]).rstrip() + "\n"
            found.append(Block(page, number + 1, "indented", text, mark))
            number, mark = end - 1, None
        elif line.strip():
            mark = None
        number += 1
    return found


def make_place(folder: Path) -> Path:
    """A directory like a clone after `make setup`: Makefile, configs, and the running environment as `.venv`."""
    (folder / ".venv").mkdir(parents=True)
    (folder / ".venv/bin").symlink_to(Path(sys.executable).parent)
    for name in ("Makefile", "configs", "pyproject.toml", "constraints.txt"):
        (folder / name).symlink_to(ROOT / name)
    (folder / ".venv/.ready").touch()
    return folder


def shell(script: str, folder: Path, **more: str) -> str:
    """What a script prints; it must end well."""
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env=environment | more,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{script}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout
