"""Exports in SGLang, which here runs on a CPU as a platform of our own (sglang_cpu.py)."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers

from specauf.drafters import DFlash2Drafter, DominoDrafter, DSparkDrafter
from specauf.drafters.proposal import greedy
from specauf.export import export_zlab
from tests.builder.conftest import make_tokenizer
from tests.drafters.tiny import MASK, VOCAB, tiny_drafter, tiny_target, vocabulary_of
from tests.interop.environments import run_in
from tests.interop.readers import Task, compare_decoding, decode_with_sglang, teach, unchosen
from tests.interop.test_vllm import SHAPE

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


@pytest.mark.parametrize("slots", [5, 3])
def test_sglang_decodes_with_dflash2_as_ours_does_token_for_token_and_cycle_for_cycle(tmp_path, slots: int):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE | {"max_position_embeddings": 1024}))
    for part in (model.bfloat16().float(), make_tokenizer()):  # numbers of bfloat16, see `rounded`
        part.save_pretrained(tmp_path / "target")
    target = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "target").eval().requires_grad_(False)
    task = Task(target, torch.randint(0, 256, (8, 9)).tolist(), new=24)
    settings: dict[str, Any] = {"taps": (1, 3, 4), "mask_token_id": 258, "block_size": 6, "selector_top_k": 7}
    drafter = teach(target, task.prompts[::2], 16, steps=150, rate=3e-3, kind=DFlash2Drafter, **settings)
    assert isinstance(drafter, DFlash2Drafter)
    export_zlab(drafter, tmp_path / "drafter", dtype=torch.float32)
    theirs = decode_with_sglang(task, tmp_path / "target", tmp_path / "drafter", tmp_path, slots)
    lengths = compare_decoding(task, drafter, theirs, block_size=slots + 1)
    assert len(lengths) > 20
    assert {1, slots + 1} < set(lengths)
    with pytest.raises(AssertionError):
        compare_decoding(task, unchosen(drafter), theirs, block_size=slots + 1)


def test_sglangs_rollout_drafts_the_tokens_of_a_domino_export_as_ours_does(tmp_path):
    target = tiny_target()
    vocabulary, drafter = vocabulary_of(target), tiny_drafter("domino", target)
    assert isinstance(drafter, DominoDrafter)
    torch.nn.init.normal_(drafter.embed_proj[2].weight)  # strong enough to change most drafted tokens
    export_zlab(drafter, tmp_path / "drafter", dtype=torch.float32)
    rows, anchors = torch.randn(40, drafter.config.slots, drafter.config.hidden_size), torch.randint(0, MASK, (40,))
    # SGLang is given a row of the anchor's slot too, and reads past it.
    hidden = torch.cat([torch.randn_like(rows[:, :1]), rows], 1)
    heads = {"embedding": vocabulary.embedding.clone(), "head": vocabulary.head.clone()}
    torch.save({"hidden": hidden, "tokens": anchors} | heads, tmp_path / "case.pt")
    run_in("sglang", "sglang_domino.py", *(str(tmp_path / name) for name in ("drafter", "case.pt", "drafted.pt")))
    theirs = torch.load(tmp_path / "drafted.pt", weights_only=True)
    with torch.no_grad():
        assert torch.equal(drafter.propose(rows, anchors, vocabulary, greedy).tokens, theirs)
        changed = theirs != vocabulary.logits(rows).argmax(-1)
    assert theirs.max() < VOCAB
    assert changed[:, 1:].float().mean() > 0.5
    assert not changed[:, 0].any()


@pytest.mark.parametrize(
    ("kind", "from_anchor"), [("vanilla", True), ("vanilla", False), ("gated", True), ("rnn", True)]
)
def test_sglang_drafts_the_tokens_of_a_dspark_export_as_ours_does_and_is_as_confident(tmp_path, kind, from_anchor):
    target = tiny_target()
    changes = {"markov_head_type": kind, "sample_from_anchor": from_anchor}
    vocabulary, drafter = vocabulary_of(target), tiny_drafter("dspark", target, **changes)
    assert isinstance(drafter, DSparkDrafter)
    torch.nn.init.normal_(drafter.markov_head.markov_w2.weight, std=4.0)  # strong enough to change most drafted tokens
    export_zlab(drafter, tmp_path / "drafter", dtype=torch.float32)
    rows, anchors = torch.randn(40, drafter.config.slots, drafter.config.hidden_size), torch.randint(0, MASK, (40,))
    # Where the anchor's slot drafts nothing SGLang is given its row too, and leaves it out.
    hidden = rows if from_anchor else torch.cat([torch.randn_like(rows[:, :1]), rows], 1)
    torch.save({"hidden": hidden, "tokens": anchors, "head": vocabulary.head.clone()}, tmp_path / "case.pt")
    run_in("sglang", "sglang_dspark.py", *(str(tmp_path / name) for name in ("drafter", "case.pt", "drafted.pt")))
    theirs = torch.load(tmp_path / "drafted.pt", weights_only=True)
    with torch.no_grad():
        drafted = drafter.propose(rows, anchors, vocabulary, greedy).tokens
        before = torch.cat([anchors[:, None], drafted[:, :-1]], 1)
        confidence = drafter.confidence_head(rows, drafter.markov_head.embed(before))
        assert torch.equal(drafted, theirs["tokens"])
        torch.testing.assert_close(confidence, theirs["confidence"], atol=1e-5, rtol=1e-5)
        assert (drafted != vocabulary.logits(rows).argmax(-1)).float().mean() > 0.5


def test_sglang_decodes_smollm2_with_dflash2_as_ours_does(taught_dflash2, rounded, tmp_path):
    drafter, task = taught_dflash2
    target, directory = rounded
    task = replace(task, model=target)
    export_zlab(drafter, tmp_path / "drafter", dtype=torch.float32)
    theirs = decode_with_sglang(task, directory, tmp_path / "drafter", tmp_path, 7)
    lengths = compare_decoding(task, drafter, theirs)
    assert len(lengths) > 50
    assert len(set(lengths)) > 3
    with pytest.raises(AssertionError):
        compare_decoding(task, unchosen(drafter), theirs)
