"""Our DFlash against z-lab's own package: the same hidden states, and the same decoding of SmolLM2."""

from pathlib import Path

import pytest
import torch

from specauf.drafters import ContextMemory
from specauf.export import export_zlab
from tests.builder.conftest import make_tokenizer
from tests.drafters.tiny import BLOCK, MASK, TAPS, prompt, tiny_dflash, tiny_target, vocabulary_of
from tests.interop.environments import run_in
from tests.interop.readers import Task, compare_decoding, decode_with, named, teach

pytestmark = pytest.mark.slow


def export_with_cases(folder: Path) -> list[torch.Tensor]:
    """Write a drafter (`zlab`) and blocks to run it on (`cases.pt`); returns our hidden states of the drafted slots."""
    torch.manual_seed(0)
    target = tiny_target()
    drafter, vocabulary = tiny_dflash(target), vocabulary_of(target)
    export_zlab(drafter, folder / "zlab", dtype=torch.float32)
    cases, ours = [], []
    for length, block in [(1, 6), (2, 3), (7, 6), (33, 2), (64, 6), (130, 5), (257, 6)]:
        features = torch.randn(length, drafter.config.feature_dim)
        tokens = torch.randint(0, MASK, (length + 1,))
        slots = vocabulary.embed(torch.cat([tokens[-1:], torch.full((block - 1,), MASK)]))
        cases.append(
            {"target_hidden": features, "noise_embedding": slots, "position_ids": torch.arange(length + block)}
        )
        memory = ContextMemory(1)
        with torch.no_grad():
            drafter.remember(memory, tokens[None, :-1], features[None], [length], vocabulary)
            ours.append(drafter.next_block_rows(memory, tokens[-1:], block - 1, vocabulary)[0])
    torch.save(cases, folder / "cases.pt")
    return ours


@pytest.mark.parametrize(
    ("package", "more"), [("dflash", ()), ("dflash_mlx", ()), ("specforge", ("sdpa",)), ("specforge", ("eager",))]
)
def test_our_weights_give_the_hidden_states_of(package: str, more: tuple[str, ...], tmp_path: Path):
    ours = export_with_cases(tmp_path)
    files = [str(tmp_path / name) for name in ("zlab", "cases.pt", "theirs.pt")]
    run_in(package, f"{package}_hidden.py", *files, *more)
    for found, expected in zip(ours, torch.load(tmp_path / "theirs.pt", weights_only=True), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


# Environments of the two halves of z-lab's package: on torch and on MLX.
HALVES = ("dflash", "dflash_mlx")


@pytest.mark.parametrize("package", HALVES)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_zlabs_loop_decodes_tiny_targets_as_ours_does_token_for_token_and_cycle_for_cycle(
    family: str, package: str, tmp_path: Path
):
    torch.manual_seed(0)
    target = tiny_target(family)
    task = Task(target, [prompt(length, seed=length).tolist() for length in range(1, 9)], new=40)
    drafter = teach(
        target, task.prompts[::2], 22, taps=TAPS, mask_token_id=MASK, block_size=BLOCK, steps=150, rate=5e-3
    )
    export_zlab(drafter, tmp_path / "zlab", dtype=torch.float32)
    theirs = decode_with(package, task, named(target, make_tokenizer(), tmp_path), tmp_path / "zlab", tmp_path)
    lengths = compare_decoding(task, drafter, theirs)
    assert len(lengths) > 50
    assert {1, BLOCK} < set(lengths)


# On a CPU, MLX takes more than a second for a cycle.
@pytest.mark.parametrize(("package", "number"), [("dflash", 16), ("dflash_mlx", 3)])
def test_zlabs_loop_decodes_smollm2_as_ours_does_token_for_token_and_cycle_for_cycle(
    taught, smollm2, package: str, number: int, tmp_path: Path
):
    drafter, task = taught
    task = Task(task.model, task.prompts[:number], task.new)
    export_zlab(drafter, tmp_path / "zlab", dtype=torch.float32)
    theirs = decode_with(package, task, named(*smollm2, tmp_path), tmp_path / "zlab", tmp_path)
    lengths = compare_decoding(task, drafter, theirs)
    assert len(lengths) > 5 * number
    assert {1, 8} < set(lengths)
