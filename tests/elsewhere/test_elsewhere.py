"""Tensors meet on one device only: training, decoding and building on a device that pretends to be another one."""

import runpy
import sys

import pytest
import torch
import transformers
from packaging.version import Version

from tests.processes import afresh, forked

TRAININGS = ["training", pytest.param("more_training", marks=pytest.mark.slow), "waiting"]
WITH_TARGET = ["decoding", "building"]
# Both by version, for where a newer one has it otherwise the tests must fail and not pass by.
devices_in_python = pytest.mark.skipif(torch.__version__ < (2, 10), reason="torch 2.9 has no devices written in Python")
targets_there = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="rotary angles of transformers 5.0 and 5.17 cannot be computed there in inference mode; those of 5.23 can",
)


def run(scenario: str, folder: str) -> None:
    sys.argv[1:] = [scenario, folder]
    runpy.run_module("tests.elsewhere.scenarios", run_name="__main__")


@devices_in_python
@pytest.mark.parametrize(
    "scenario", ["it_is_a_device", *TRAININGS, *(pytest.param(name, marks=targets_there) for name in WITH_TARGET)]
)
def test_the_numbers_elsewhere_are_those_of_the_cpu(scenario, tmp_path):
    done = forked(run, scenario, str(tmp_path))
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.gpu
@pytest.mark.parametrize("scenario", [*TRAININGS, *WITH_TARGET, "mixed_precision"])
def test_the_numbers_on_a_gpu_are_those_of_the_cpu(scenario, tmp_path):
    done = afresh("-m", "tests.elsewhere.scenarios", scenario, str(tmp_path), "cuda")
    assert done.returncode == 0, done.stderr[-4000:]
