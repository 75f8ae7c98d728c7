"""SmolLM2: a drafter that knows one answer by heart decodes it in whole blocks, after export and reload."""

from pathlib import Path

import pytest
import torch

from specauf.checkpoint import load_drafter
from specauf.decoding import speculative_generate
from specauf.drafters import DFlashDrafter, DominoConfig, DominoDrafter, Drafter, DrafterConfig
from specauf.targets import default_taps, load_target, resolve_target
from tests.drafters.test_kinds import learn
from tests.drafters.tiny import batch_of, document, vocabulary_of

pytestmark = pytest.mark.slow
BLOCK, BLOCKS = 16, 3


@pytest.mark.parametrize("kind", ["dflash", "domino"])
def test_a_drafter_of_smollm2_decodes_what_it_knows_by_heart(kind: str, tmp_path: Path):
    target, tokenizer = load_target(resolve_target("smollm2-135m"))
    chat = [{"role": "user", "content": "Explain what a list is in Python."}]
    ids = torch.tensor(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False))
    taps = default_taps(target.config.num_hidden_layers)
    new = 1 + BLOCKS * BLOCK  # the prompt's pass gives the first token
    d = document(target, 0, new, taps=taps, ids=ids)
    settings = {"taps": taps, "mask_token_id": 16, "block_size": BLOCK, "num_hidden_layers": 1}
    text = target.config.to_dict()
    drafter: Drafter = (
        DFlashDrafter(DrafterConfig.from_target(text, **settings))
        if kind == "dflash"
        else DominoDrafter(DominoConfig.from_target(text, **settings, gru_hidden_dim=64, emb_dim=32))
    )
    vocabulary = vocabulary_of(target)
    anchors = list(range(len(ids), len(d.tokens) - 1, 4))
    assert (
        learn(drafter, vocabulary, batch_of([d], [anchors], BLOCK), steps=200 if kind == "dflash" else 400, rate=2e-3)
        < 0.02
    )
    drafter.save_pretrained(tmp_path, dtype=torch.float32)
    result = speculative_generate(target, load_drafter(tmp_path), ids[None], max_new_tokens=new, stop_token_ids=[])
    assert list(result.tokens) == d.tokens[len(ids) :].tolist()
    assert 1 + sum(result.accepted) / len(result.accepted) >= 0.95 * BLOCK
