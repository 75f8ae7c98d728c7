"""Programs leave cores to others: waiting threads sleep, unless the user says otherwise."""

import os
import subprocess
import sys

import pytest

# What torch finds in the environment, if it is not loaded before.
CODE = """
import os, sys
class Torch:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "torch":
            print({{k: os.environ.get(k) for k in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}}, flush=True)
            os._exit(0)
sys.meta_path.insert(0, Torch)
import {}
import torch
"""


@pytest.mark.parametrize("module", ["specauf.cli", "cache_builder.cli", "studies.__main__"])
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"GOMP_SPINCOUNT": "10000", "OMP_WAIT_POLICY": None}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7", "OMP_WAIT_POLICY": None}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": None, "OMP_WAIT_POLICY": "ACTIVE"}),
    ],
)
def test_torch_learns_how_threads_wait_before_it_starts_them(
    module: str, given: dict[str, str], expected: dict[str, str | None]
) -> None:
    clean = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    out = subprocess.run(
        [sys.executable, "-c", CODE.format(module)], env=clean | given, capture_output=True, text=True, check=True
    )
    assert out.stdout == f"{expected}\n"
