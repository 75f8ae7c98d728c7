"""Processes of their own: interpreters as users start them, and forks of a process that has imported everything.

What is run in a fork ends as in a fresh interpreter, but for what stands in `atexit`, and finds more modules loaded.
"""

import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
METHOD = "forkserver"  # of what has imported everything
_CONTEXT = multiprocessing.get_context(METHOD)
_CONTEXT.set_forkserver_preload(["specauf.training_cli", "cache_builder.driver"])


def afresh(*words: str, folder: Path | None = None) -> "subprocess.CompletedProcess[str]":
    """Run `python WORDS` to its end, in a folder or here."""
    environment = os.environ | _ENVIRONMENT | {"PYTHONPATH": str(Path.cwd())}
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=environment, cwd=folder, check=False
    )


def forked(call: Callable[..., object], *args: Any, seconds: float | None = None) -> "subprocess.CompletedProcess[str]":
    """Run a function of a module to its end, which it may choose by SystemExit.

    Args:
        call: the function.
        args: for it; pickled.
        seconds: when it is killed if it is still there.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        with pytest.MonkeyPatch.context() as patch:  # also for the process they are forked from, where it starts here
            for name, value in _ENVIRONMENT.items():
                patch.setenv(name, value)
            process = _CONTEXT.Process(target=_life, args=(str(out), str(err), dict(os.environ), call, args))
            process.start()
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
        assert process.exitcode is not None
        said = [file.read_text() if file.exists() else "" for file in (out, err)]
        return subprocess.CompletedProcess([], process.exitcode, *said)


def limit_files(size: int) -> None:
    """Let this process write no file longer than so many bytes, as on a full disk, and Python none of its own."""
    sys.dont_write_bytecode = True  # a cut one is not noticed until another process reads it
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, -1))


def _life(out: str, err: str, environment: dict[str, str], call: Callable[..., object], args: tuple[Any, ...]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
    multiprocessing.set_start_method(None, force=True)  # that of a fresh interpreter, for DataLoader's workers
    torch.set_num_threads(1)
    call(*args)
