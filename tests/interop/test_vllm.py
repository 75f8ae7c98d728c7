"""Exports in both layouts in vLLM, which here runs on a CPU."""

import pytest
import torch

from specauf.drafters import TargetVocabulary
from specauf.export import TargetFacts, export_speculators, export_zlab
from tests.interop.readers import compare_decoding, decode_with_vllm

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("layout", ["zlab", "speculators"])
@pytest.mark.parametrize("slots", [7, 3])
def test_vllm_decodes_smollm2_as_ours_does_token_for_token_and_cycle_for_cycle(
    taught, smollm2_directory, tmp_path, layout, slots
):
    drafter, task = taught
    out = tmp_path / "drafter"
    if layout == "zlab":
        export_zlab(drafter, out, dtype=torch.float32)
    else:
        vocabulary = TargetVocabulary.from_target(task.model)
        facts = TargetFacts.from_config(task.model.config.to_dict(), str(smollm2_directory), vocabulary=vocabulary)
        export_speculators(drafter, out, target=facts, dtype=torch.float32)
    theirs = decode_with_vllm(task, smollm2_directory, out, tmp_path, slots)
    assert compare_decoding(task, drafter, theirs, block_size=slots + 1) > 50
