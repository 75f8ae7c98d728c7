"""llama.cpp built from source: its own converter, and its server decoding with a drafter.

Sources are those inside `llama-cpp-python`, for llama.cpp itself is not on PyPI. Needs a C++ compiler; building takes
ten minutes on two cores, once.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest

from tests.interop.environments import PLACE, python_of
from tests.interop.readers import Answers, Task

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="building llama.cpp takes a C++ compiler")
RELEASE = "0.3.36"  # llama.cpp at 0c1e57098


def sources() -> Path:
    """llama.cpp's sources, downloaded on first use."""
    folder = PLACE / f"llama_cpp_python-{RELEASE}"
    if not folder.exists():
        PLACE.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "llama-cpp-python"]
        subprocess.run([*pip, "-d", str(PLACE), f"llama-cpp-python=={RELEASE}"], check=True, capture_output=True)
        unpacked, archive = PLACE / "unpacked", PLACE / f"{folder.name}.tar.gz"
        with tarfile.open(archive) as packed:
            packed.extractall(unpacked, filter="data")
        (unpacked / folder.name).rename(folder)
        unpacked.rmdir()
        archive.unlink()
    return folder / "vendor" / "llama.cpp"


def server() -> Path:
    """`llama-server`, built on first use."""
    build = PLACE / f"llama_cpp-{RELEASE}"
    binary, done = build / "bin" / "llama-server", build / "done"
    if not done.exists():
        cmake = str(python_of("llama_cpp").parent / "cmake")
        off = [f"-D{name}=OFF" for name in ("BUILD_SHARED_LIBS", "LLAMA_OPENSSL", "LLAMA_USE_PREBUILT_UI")]
        configure = [cmake, "-S", str(sources()), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release", *off]
        jobs = str(os.cpu_count() or 1)
        for command in (configure, [cmake, "--build", str(build), "-j", jobs, "--target", "llama-server"]):
            made = subprocess.run(command, capture_output=True, text=True, check=False)
            assert made.returncode == 0, made.stderr[-4000:]
        done.touch()
    return binary


def convert(model: Path, out: Path, *options: str, kind: str = "f32") -> Path:
    """A model or drafter in Hugging Face's layout as GGUF, by llama.cpp's converter."""
    command = [python_of("llama_cpp"), sources() / "convert_hf_to_gguf.py", model, "--outtype", kind, "--outfile", out]
    environment = os.environ | {"PYTHONPATH": str(sources() / "gguf-py")}
    done = subprocess.run([*command, *options], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return out


def decode_with_llama_cpp(
    task: Task, target: Path, drafter: Path, folder: Path, slots: int, kind: str = "dflash"
) -> Answers:
    """Tokens, and those of every cycle, by `llama-server`; target and drafter are GGUF files in fp32.

    Args:
        kind: llama.cpp's name of the drafter's.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = f"--spec-type draft-{kind} --spec-draft-n-max {slots} --host 127.0.0.1 --port {port} -np 1 -c 2048 -t 1"
    exact = "-ctk f32 -ctv f32 -ctkd f32 -ctvd f32 -fa off"
    command = [str(server()), "-m", str(target), "-md", str(drafter), *f"{words} {exact} --offline -lv 5".split()]
    answers, log = [], folder / "llama-server.log"
    with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=out) as running:
        try:
            _wait(f"http://127.0.0.1:{port}/health", running, log)
            for prompt in task.prompts:
                wanted = {"prompt": prompt, "n_predict": task.new, "temperature": 0, "return_tokens": True}
                data = json.dumps(wanted | {"cache_prompt": False}).encode()
                request = Request(f"http://127.0.0.1:{port}/completion", data, {"Content-Type": "application/json"})
                with urlopen(request) as reply:
                    answers.append(json.load(reply)["tokens"])
        finally:
            running.terminate()
    # The server's replies have sums alone; what each cycle accepted is in its log, by number of the request.
    cycles: dict[int, list[int]] = {}
    for number, accepted in re.findall(r"task (\d+) \| accepted +(\d+)/ *\d+ draft tokens", log.read_text()):
        cycles.setdefault(int(number), []).append(int(accepted) + 1)
    return [{"tokens": a, "produced": c} for a, (_, c) in zip(answers, sorted(cycles.items()), strict=True)]


def _wait(url: str, running: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(600):
        assert running.poll() is None, log.read_text()[-4000:]
        try:
            with urlopen(url):
                return
        except (URLError, ConnectionError):
            time.sleep(0.2)
    raise AssertionError(f"the server does not answer: {log.read_text()[-4000:]}")
