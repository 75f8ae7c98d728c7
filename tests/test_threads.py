"""Commands leave cores to other programs: waiting threads sleep, unless the user says otherwise."""

import os
import subprocess
import sys

import pytest

SHOW = (
    "import os, sys; {}; "
    "print('torch' in sys.modules, {{k: os.environ.get(k) for k in ('GOMP_SPINCOUNT', 'OMP_WAIT_POLICY')}})"
)


@pytest.mark.parametrize("start", ["from specauf.cli import main; main(['--version'])", "import cache_builder"])
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"GOMP_SPINCOUNT": "1000", "OMP_WAIT_POLICY": None}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7", "OMP_WAIT_POLICY": None}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": None, "OMP_WAIT_POLICY": "ACTIVE"}),
    ],
)
def test_a_command_says_how_threads_wait_before_torch_starts_them(
    start: str, given: dict[str, str], expected: dict[str, str | None]
) -> None:
    clean = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    out = subprocess.run(
        [sys.executable, "-c", SHOW.format(start)], env=clean | given, capture_output=True, text=True, check=True
    )
    assert out.stdout.splitlines()[-1] == f"False {expected}"
