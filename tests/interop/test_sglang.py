"""Exports in SGLang, which here runs on a CPU as a platform of our own (sglang_cpu.py)."""

from dataclasses import replace

import pytest
import torch

from specauf.export import export_zlab
from tests.interop.readers import compare_decoding, decode_with_sglang

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("slots", [7, 3])
def test_sglang_decodes_smollm2_as_ours_does_token_for_token_and_cycle_for_cycle(taught, rounded, tmp_path, slots):
    drafter, task = taught
    target, directory = rounded
    task = replace(task, model=target)
    export_zlab(drafter, tmp_path / "drafter", dtype=torch.float32)
    theirs = decode_with_sglang(task, directory, tmp_path / "drafter", tmp_path, slots)
    lengths = compare_decoding(task, drafter, theirs, block_size=slots + 1)
    assert len(lengths) > 50
    assert {1, slots + 1} < set(lengths)
