"""Our drafters in SpecForge's classes, and its in ours: the same logits, the same drafts, the same decoding."""

from pathlib import Path

import numpy as np
import pytest
import torch

from specauf.checkpoint import load_directory
from specauf.drafters import DominoDrafter
from specauf.drafters.proposal import greedy
from tests.builder.conftest import make_target
from tests.drafters.test_kinds import learn
from tests.drafters.tiny import (
    BLOCK,
    MASK,
    TinyDocument,
    batch_of,
    document,
    tiny_drafter,
    tiny_target,
    vocabulary_of,
)
from tests.interop.environments import run_in
from tests.interop.readers import Task, compare_decoding, decode_with

pytestmark = pytest.mark.slow
PREFIXES = (0, 1, 2)


@pytest.fixture(scope="module")
def answered(tmp_path_factory) -> list[tuple[DominoDrafter, dict, dict]]:
    """Domino drafters of several `pure_draft_prefix_len`, the case each was given in, and SpecForge's answer."""
    folder = tmp_path_factory.mktemp("domino")
    torch.manual_seed(0)
    target = tiny_target()
    vocabulary, random = vocabulary_of(target), np.random.default_rng(0)
    d = TinyDocument(0, random.integers(0, MASK, 60), np.ones(60, bool), random.standard_normal((60, 64), np.float32))
    # All blocks lie inside the document, so that every slot can be compared.
    batch = batch_of([d], [list(range(5, len(d.tokens) - BLOCK, 3))])
    tokens = batch.tokens[batch.anchors[:, None] + torch.arange(BLOCK)]
    drafters, cases = [], []
    for prefix in PREFIXES:
        drafter = tiny_drafter("domino", target, pure_draft_prefix_len=prefix)
        assert isinstance(drafter, DominoDrafter)
        torch.nn.init.normal_(drafter.embed_proj[2].weight)  # strong enough to change most drafted tokens
        drafter.save_pretrained(folder / str(prefix))
        with torch.no_grad():
            base, final = drafter.branches(batch, vocabulary)
            ours = {"rows": base.rows, "final": final.head(final.rows), "base": base.head(base.rows)}
        # Their head is given a row of the anchor's slot too, and reads past it.
        hidden = torch.cat([torch.randn_like(base.rows[:, :1]), base.rows.detach()], 1)
        cases.append({"directory": str(folder / str(prefix)), "hidden": hidden, "tokens": tokens})
        drafters.append((drafter, ours))
    heads = {"embedding": vocabulary.embedding.clone(), "head": vocabulary.head.clone()}
    torch.save([case | heads for case in cases], folder / "cases.pt")
    run_in("specforge", "specforge_head.py", str(folder / "cases.pt"), str(folder / "theirs.pt"))
    theirs = torch.load(folder / "theirs.pt", weights_only=True)
    return [
        (drafter, ours | case | {"vocabulary": vocabulary}, answer)
        for (drafter, ours), case, answer in zip(drafters, cases, theirs, strict=True)
    ]


@pytest.mark.parametrize("number", range(len(PREFIXES)))
def test_domino_gives_specforges_final_logits_in_training_and_in_replay(answered, number: int):
    drafter, ours, theirs = answered[number]
    rows, tokens = ours["rows"], ours["tokens"]
    expected = theirs["final"][:, 1:]
    torch.testing.assert_close(ours["final"], expected, atol=1e-5, rtol=0)
    everyone = torch.arange(len(rows))
    with torch.no_grad():
        for slot in range(BLOCK - 1):
            given = (rows, slot, everyone, tokens[:, 0], tokens[:, 1:], ours["vocabulary"])
            torch.testing.assert_close(drafter.slot_draft(*given)[0], expected[:, slot], atol=1e-5, rtol=0)
    changed = (expected - ours["base"]).abs().amax((0, 2)) > 1e-2
    assert changed.tolist() == [slot >= PREFIXES[number] for slot in range(BLOCK - 1)]


@pytest.mark.parametrize("number", range(len(PREFIXES)))
def test_domino_drafts_specforges_tokens(answered, number: int):
    drafter, ours, theirs = answered[number]
    with torch.no_grad():
        proposal = drafter.propose(ours["rows"], ours["tokens"][:, 0], ours["vocabulary"], greedy)
    assert torch.equal(proposal.tokens, theirs["tokens"])
    # Where the head corrects, it decides, and not the backbone alone.
    changed = (theirs["tokens"] != ours["base"].argmax(-1)).float().mean(0)
    assert changed[PREFIXES[number] :].mean() > 0.5


@pytest.mark.parametrize("number", range(len(PREFIXES)))
def test_a_domino_that_specforge_wrote_is_read_with_the_same_logits(answered, number: int):
    drafter, ours, theirs = answered[number]
    read = load_directory(Path(ours["directory"]) / "again")
    assert isinstance(read, DominoDrafter)
    assert read.config == drafter.config
    rows, tokens = ours["rows"], ours["tokens"]
    with torch.no_grad():
        for slot in range(BLOCK - 1):
            given = (rows, slot, torch.arange(len(rows)), tokens[:, 0], tokens[:, 1:], ours["vocabulary"])
            torch.testing.assert_close(read.slot_draft(*given)[0], theirs["final"][:, slot + 1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["dflash", "domino"])
def test_specforges_spec_generate_decodes_as_ours_does_cycle_for_cycle(
    kind: str, target_directory: Path, tmp_path: Path
):
    torch.manual_seed(0)
    target, taps = make_target().requires_grad_(False), (1, 3, 5)
    prompts = torch.randint(0, 256, (4, 9), generator=torch.Generator().manual_seed(1)).tolist()
    drafter = tiny_drafter(kind, target, taps=taps, mask_token_id=258, block_size=6)
    # It half knows the answers: blocks are accepted whole, in part, and not at all.
    known = [document(target, 0, 40, taps=taps, ids=torch.tensor(prompt)) for prompt in prompts]
    starts = [list(range(len(prompts[0]), len(d.tokens) - 1, 3)) for d in known]
    learn(drafter, vocabulary_of(target), batch_of(known, starts, 6), steps=40)
    drafter.eval().save_pretrained(tmp_path / "drafter")
    name = str(target_directory / "target.yaml")
    task = Task(target, prompts, new=40)
    theirs = decode_with("specforge", task, name, tmp_path / "drafter", tmp_path)
    lengths = compare_decoding(task, drafter, theirs)
    assert len(lengths) > 20
    assert {1, 6} < set(lengths)
