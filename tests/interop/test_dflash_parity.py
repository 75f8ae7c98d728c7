"""Our DFlash against z-lab's own package: the same hidden states, and the same decoding of SmolLM2."""

from pathlib import Path

import pytest
import torch

from specauf.drafters import ContextMemory, DFlashDrafter, DrafterConfig
from specauf.export import export_zlab
from specauf.targets import default_taps, load_target, resolve_target
from tests.drafters.test_kinds import learn
from tests.drafters.tiny import MASK, batch_of, document, tiny_dflash, tiny_target, vocabulary_of
from tests.interop.environments import run_in
from tests.interop.test_exports import compare_decoding

pytestmark = pytest.mark.slow
BLOCK, NEW = 8, 20
# Beginnings that SmolLM2 continues in sixteen different ways.
BEGINNINGS = (
    "Write a Python function that adds two numbers.", "Name three colours.", "What is the capital of France?",
    "Count from one to ten.", "Explain what a list is in Python.", "Tell me a short story about a cat.",
    "How do I boil an egg?", "Sort these numbers: 3, 1, 2.", "Write a haiku.", "What is 12 times 12?",
    "Translate 'good morning' to Spanish.", "List the days of the week.", "What does HTTP stand for?",
    "Write a SQL query that selects all users.", "Give me a recipe for pancakes.", "Why is the sky blue?",
)  # fmt: skip


def test_our_weights_give_zlabs_hidden_states(tmp_path: Path):
    torch.manual_seed(0)
    target = tiny_target()
    drafter, vocabulary = tiny_dflash(target), vocabulary_of(target)
    export_zlab(drafter, tmp_path / "zlab", dtype=torch.float32)
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
    torch.save(cases, tmp_path / "cases.pt")
    run_in("dflash", "dflash_hidden.py", *(str(tmp_path / name) for name in ("zlab", "cases.pt", "theirs.pt")))
    for found, expected in zip(ours, torch.load(tmp_path / "theirs.pt", weights_only=True), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_zlabs_generate_decodes_smollm2_as_ours_does_token_for_token_and_cycle_for_cycle(tmp_path: Path):
    torch.manual_seed(0)
    target, tokenizer = load_target(resolve_target("smollm2-135m"))
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        for text in BEGINNINGS
    ]
    vocabulary = vocabulary_of(target)
    taps = default_taps(target.config.num_hidden_layers)
    settings = {"taps": taps, "mask_token_id": 16, "block_size": BLOCK, "num_hidden_layers": 1}
    drafter = DFlashDrafter(DrafterConfig.from_target(target.config.to_dict(), **settings))
    # It knows half of the answers, more or less: blocks are accepted whole, in part, and not at all.
    known = [document(target, 0, NEW, taps=taps, ids=torch.tensor(prompt)) for prompt in prompts[::2]]
    starts = [range(len(p), len(d.tokens) - 1, 3) for p, d in zip(prompts[::2], known, strict=True)]
    learn(drafter, vocabulary, batch_of(known, [list(s) for s in starts], BLOCK), steps=30, rate=2e-3)
    export_zlab(drafter, tmp_path / "zlab", dtype=torch.float32)
    cycles = compare_decoding(drafter, tmp_path / "zlab", "smollm2-135m", prompts, NEW, tmp_path)
    assert cycles > 50
