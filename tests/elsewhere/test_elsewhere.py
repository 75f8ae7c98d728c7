"""Tensors meet on one device only: training, decoding and building on a device that pretends to be another one."""

import os
import runpy
import subprocess
import sys

import pytest
import torch

from tests.processes import forked

WHOLE_RUNS = ["training", pytest.param("more_training", marks=pytest.mark.slow), "waiting", "decoding", "building"]


def run(scenario: str, folder: str) -> None:
    sys.argv[1:] = [scenario, folder]
    runpy.run_module("tests.elsewhere.scenarios", run_name="__main__")


# By version, for a newer torch in which such devices are made otherwise must fail here and not pass by.
@pytest.mark.skipif(torch.__version__ < (2, 13), reason="devices are written in Python from torch 2.13 on")
@pytest.mark.parametrize("scenario", ["it_is_a_device", *WHOLE_RUNS])
def test_the_numbers_elsewhere_are_those_of_the_cpu(scenario, tmp_path):
    done = forked(run, scenario, str(tmp_path))
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.gpu
@pytest.mark.parametrize("scenario", [*WHOLE_RUNS, "mixed_precision"])
def test_the_numbers_on_a_gpu_are_those_of_the_cpu(scenario, tmp_path):
    words = [sys.executable, "-m", "tests.elsewhere.scenarios", scenario, str(tmp_path), "cuda"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
