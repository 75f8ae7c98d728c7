"""What the benchmarks share: processes of their own, spreads, ratios of one round, and what they ran on."""

import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from math import log
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "lightning", "transformers", "zarr")


def peak_bytes(device: str = "cpu") -> int:
    """The most memory that was held at once so far: of this process, or of CUDA's allocator.

    Where Linux says it, from there: elsewhere a child's figure begins at its parent's peak.
    """
    if device == "cuda":
        import torch  # not for those that only start processes

        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else []:
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_peak() -> None:
    """Let the peak begin again at what is held now, where the system can (Linux)."""
    file = Path("/proc/self/clear_refs")
    if file.exists():
        file.write_text("5")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def ratios(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Spread of above / below, round by round: what slows a whole round falls on both."""
    return spread([a / b for a, b in zip(above, below, strict=True)])


def shown(values: dict[str, float], digits: int = 2) -> str:
    """`1.23 (1.20 to 1.31)`."""
    middle, least, most = (f"{values[key]:,.{digits}f}" for key in ("median", "least", "most"))
    return f"{middle} ({least} to {most})"


def growth(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Exponent of cost against size, by least squares on logarithms: 1 is linear, 0 constant.

    Raises:
        ValueError: fewer than two different sizes.
    """
    return statistics.linear_regression([log(s) for s in sizes], [log(c) for c in costs]).slope


def answer(command: Sequence[str], **environment: str) -> dict[str, Any]:
    """Run a command in a process of its own and read the JSON of its last line; its errors go to ours."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | environment)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def clock(command: Sequence[str]) -> tuple[float, float]:
    """Seconds of a command that must succeed: by the clock, and of the processor."""
    used, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    seconds, now = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime


def machine() -> dict[str, Any]:
    """Processor, cores, load, date and versions, and the GPU where torch is at work and has one."""
    info = Path("/proc/cpuinfo")  # Linux only
    lines = info.read_text().splitlines() if info.exists() else []
    torch = sys.modules.get("torch")  # not for those that only start processes
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        **({"gpu": torch.cuda.get_device_name()} if torch and torch.cuda.is_available() else {}),
    }


def finish(result: dict[str, Any], path: str | None) -> None:
    """Print the figures as one JSON line, and write it to a file too when one is named."""
    line = json.dumps({**result, "machine": machine()})
    if path:
        Path(path).write_text(line + "\n")
    print(line)
