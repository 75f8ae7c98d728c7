"""Our DFlash and DFlash 2 against z-lab's own package: the same hidden states, drafts, and decoding of SmolLM2."""

from pathlib import Path

import pytest
import torch

from specauf.drafters import ContextMemory, DFlash2Drafter, DFlashDrafter
from specauf.export import export_zlab
from tests.builder.conftest import make_tokenizer
from tests.drafters.tiny import BLOCK, MASK, TAPS, prompt, tiny_drafter, tiny_target, vocabulary_of
from tests.interop.environments import run_in
from tests.interop.readers import Task, compare_decoding, decode_with, named, teach, whole_blocks_without_its_parts

pytestmark = pytest.mark.slow


def export_with_cases(folder: Path, kind: str = "dflash") -> list[torch.Tensor]:
    """Write a drafter (`zlab`) and blocks to run it on (`cases.pt`); returns our hidden states of the drafted slots."""
    torch.manual_seed(0)
    target = tiny_target()
    drafter, vocabulary = tiny_drafter(kind, target), vocabulary_of(target)
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
    ("package", "kind", "more"),
    [
        ("dflash", "dflash", ()),
        ("dflash", "dflash2", ()),
        ("dflash_mlx", "dflash", ()),
        ("dflash_mlx", "dflash2", ()),
        ("specforge", "dflash", ("sdpa",)),
        ("specforge", "dflash", ("eager",)),
    ],
)
def test_our_weights_give_the_hidden_states_of(package: str, kind: str, more: tuple[str, ...], tmp_path: Path):
    ours = export_with_cases(tmp_path, kind)
    files = [str(tmp_path / name) for name in ("zlab", "cases.pt", "theirs.pt")]
    run_in(package, f"{package}_hidden.py", *files, *more)
    # Of random kernels rounding errors are larger.
    most = 1e-4 if kind == "dflash2" else 1e-5
    for found, expected in zip(ours, torch.load(tmp_path / "theirs.pt", weights_only=True), strict=True):
        torch.testing.assert_close(found, expected, atol=most, rtol=0)


# Environments of the two halves of z-lab's package: on torch and on MLX.
HALVES = ("dflash", "dflash_mlx")


@pytest.mark.parametrize("package", HALVES)
@pytest.mark.parametrize(("temperature", "cap"), [(0.0, None), (0.7, None), (0.0, 2.0), (0.7, 2.0)])
def test_zlabs_selector_drafts_as_ours_does_from_the_same_candidates(
    package: str, temperature: float, cap: float | None, tmp_path: Path
):
    torch.manual_seed(0)
    target = tiny_target()
    target.config.final_logit_softcapping = cap
    drafter, vocabulary = tiny_drafter("dflash2", target), vocabulary_of(target)
    assert isinstance(drafter, DFlash2Drafter)
    export_zlab(drafter, tmp_path / "zlab", dtype=torch.float32)
    rows, anchors = torch.randn(20, BLOCK - 1, drafter.config.hidden_size), torch.arange(20)
    torch.save({"head": vocabulary.head, "rows": rows, "anchors": anchors}, tmp_path / "given.pt")
    files = [str(tmp_path / name) for name in ("zlab", "given.pt", "theirs.pt")]
    run_in(package, f"{package}_propose.py", *files[:2], str(temperature), files[2])
    chosen_otherwise = 0
    for row, anchor, theirs in zip(rows, anchors, torch.load(files[2], weights_only=True), strict=True):
        dictated = iter(theirs["tokens"])
        seen: list[torch.Tensor] = []

        def choose(logits: torch.Tensor, dictated=dictated, seen=seen) -> tuple[torch.Tensor, None]:
            seen.append(logits[0])
            return next(dictated)[None], None

        with torch.no_grad():
            drafter.propose(row[None], anchor[None], vocabulary, choose)
            plain = vocabulary.logits(row).argmax(-1)
        final = torch.stack(seen)
        assert torch.equal(final.isfinite().nonzero()[:, 1].view(BLOCK - 1, -1), theirs["candidates"].sort().values)
        if temperature:
            probs = torch.zeros_like(final).scatter(1, theirs["candidates"], theirs["probs"])
            torch.testing.assert_close((final / temperature).softmax(-1), probs, atol=1e-5, rtol=0)
        else:
            assert torch.equal(final.argmax(-1), theirs["tokens"])
        chosen_otherwise += int((theirs["tokens"] != plain).sum())
    assert 10 < chosen_otherwise < 90  # of 100


SMALL = {"conv_group_size": 8, "selector_rank": 12, "selector_top_k": 5}


@pytest.mark.parametrize("package", HALVES)
@pytest.mark.parametrize(("kind", "own"), [(DFlashDrafter, {}), (DFlash2Drafter, SMALL)])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_zlabs_loop_decodes_tiny_targets_as_ours_does_token_for_token_and_cycle_for_cycle(
    family: str, kind: type[DFlashDrafter], own: dict[str, int], package: str, tmp_path: Path
):
    torch.manual_seed(0)
    target = tiny_target(family)
    task = Task(target, [prompt(length, seed=length).tolist() for length in range(1, 9)], new=40)
    shape = {"taps": TAPS, "mask_token_id": MASK, "block_size": BLOCK} | own
    drafter = teach(target, task.prompts[::2], 22, kind=kind, steps=150, rate=5e-3, **shape)
    export_zlab(drafter, tmp_path / "zlab", dtype=torch.float32)
    theirs = decode_with(package, task, named(target, make_tokenizer(), tmp_path), tmp_path / "zlab", tmp_path)
    lengths = compare_decoding(task, drafter, theirs)
    assert len(lengths) > 50
    assert {1, BLOCK} < set(lengths)
    if isinstance(drafter, DFlash2Drafter):
        assert max(whole_blocks_without_its_parts(task, drafter)) < lengths.count(BLOCK)


# On a CPU, MLX takes more than a second for a cycle.
@pytest.mark.parametrize("known", ["taught", "taught_dflash2"])
@pytest.mark.parametrize(("package", "number"), [("dflash", 16), ("dflash_mlx", 3)])
def test_zlabs_loop_decodes_smollm2_as_ours_does_token_for_token_and_cycle_for_cycle(
    known: str, smollm2, package: str, number: int, tmp_path: Path, request
):
    drafter, task = request.getfixturevalue(known)
    task = Task(task.model, task.prompts[:number], task.new)
    export_zlab(drafter, tmp_path / "zlab", dtype=torch.float32)
    theirs = decode_with(package, task, named(*smollm2, tmp_path), tmp_path / "zlab", tmp_path)
    lengths = compare_decoding(task, drafter, theirs)
    assert len(lengths) > 5 * number
    assert {1, 8} < set(lengths)
