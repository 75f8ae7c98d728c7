"""Sampled decoding has the target's law: tested by counting, against full enumeration."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from specauf.decoding import speculative_generate, speculative_generate_batch
from specauf.decoding.rules import make_rule
from specauf.decoding.sampling import leading, reject_or_accept, sample, warp
from specauf.drafters.proposal import Proposal
from tests.drafters.tiny import prompt, tiny_dflash, tiny_target

V, SLOTS, SAMPLES = 5, 2, 200_000
# Temperature, top-k, top-p.
SETTINGS = [(0.5, None, None), (1.0, None, 0.8), (1.7, 3, None), (1.0, 4, 0.9)]


def chi_square_limit(freedom: int, normal_quantile: float = 2.326) -> float:
    """0.99 quantile of chi-square by Wilson and Hilferty's approximation, good to 0.5 % from 3 degrees on."""
    return freedom * (1 - 2 / (9 * freedom) + normal_quantile * (2 / (9 * freedom)) ** 0.5) ** 3


class Machine:
    """A target and a drafter as tables: the next token's logits depend on the last token; drafts on the slot too."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.target = torch.randn(V, V, generator=generator) * 1.5
        self.draft = torch.randn(SLOTS, V, generator=generator) * 1.5
        self.start = 2

    def law(self, warping: tuple) -> Tensor:
        """Probability of every three-token continuation, enumerated: [V, V, V]."""
        p = warp(self.target, *warping).double()
        return p[self.start][:, None, None] * p[:, :, None] * p[None, :, :]

    def decode(self, rule, samples: int) -> tuple[Tensor, Tensor]:
        """Three tokens from one or more cycles for each sample, and A of the first cycle; vectorised over samples."""
        out = torch.full((samples, 3), -1)
        have = torch.zeros(samples, dtype=torch.long)
        last = torch.full((samples,), self.start)
        first_accepted = None
        while len(todo := torch.nonzero(have < 3)[:, 0]):
            tokens, probs = rule.choose(self.draft.expand(len(todo), SLOTS, V))
            seen = torch.cat([last[todo, None], tokens], 1)
            accepted, following = rule.verify(Proposal(tokens, probs), self.target[seen])
            first_accepted = accepted if first_accepted is None else first_accepted
            for slot in range(SLOTS + 1):
                token = following if slot == SLOTS else torch.where(accepted == slot, following, tokens[:, slot])
                row = todo[(slot <= accepted) & (have[todo] < 3)]
                out[row, have[row]] = token[(slot <= accepted) & (have[todo] < 3)]
                have[row] += 1
            last[todo] = following
        return out, first_accepted


def distance(out: Tensor, law: Tensor) -> tuple[float, int]:
    """Chi-square of three-token continuations against their law, cells of fewer than 5 pooled; infinite outside it."""
    counts = torch.bincount(out[:, 0] * V * V + out[:, 1] * V + out[:, 2], minlength=V**3).double()
    expected = law.flatten() * len(out)
    if counts[expected == 0].any():
        return float("inf"), 1
    small = expected < 5
    cells = (
        torch.cat([expected[~small], expected[small].sum()[None]]),
        torch.cat([counts[~small], counts[small].sum()[None]]),
    )
    used = cells[0] > 0
    return float(((cells[1] - cells[0])[used] ** 2 / cells[0][used]).sum()), int(used.sum()) - 1


@pytest.mark.parametrize("sampling", ["rejection", "greedy-draft"])
@pytest.mark.parametrize("warping", SETTINGS)
def test_output_has_the_targets_law(warping: tuple, sampling: str):
    machine = Machine(1)
    rule = make_rule(*warping, sampling, torch.Generator().manual_seed(3))
    out, accepted = machine.decode(rule, SAMPLES)
    found, freedom = distance(out, machine.law(warping))
    assert found < chi_square_limit(freedom)
    p, q = warp(machine.target[machine.start], *warping), warp(machine.draft[0], *warping)
    rate = float(torch.minimum(p, q).sum()) if sampling == "rejection" else float(p[machine.draft[0].argmax()])
    interval = 3 * (rate * (1 - rate) / SAMPLES) ** 0.5
    assert float((accepted > 0).double().mean()) == pytest.approx(rate, abs=interval)


def _accepts_on_average(tokens: Tensor, draft: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Wrong: the residual is drawn from p and not from norm(max(0, p - q))."""
    p, q = (t[:, :SLOTS].gather(2, tokens[..., None])[..., 0] for t in (target, draft))
    accepted = leading(torch.rand(p.shape) * q < p)
    return accepted, sample(target[torch.arange(len(tokens)), accepted])


def _accepts_too_much(tokens: Tensor, draft: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Wrong: acceptance with probability min(1, 1.1 p/q)."""
    p, q = (t[:, :SLOTS].gather(2, tokens[..., None])[..., 0] for t in (target, draft))
    accepted = leading(torch.rand(p.shape) * q < 1.1 * p)
    row = torch.arange(len(tokens))
    minus = torch.cat([draft, torch.zeros_like(target[:, :1])], 1)[row, accepted]
    residual = (target[row, accepted] - minus).clamp(min=0) + 1e-9
    return accepted, sample(residual)


@pytest.mark.parametrize("wrong", [_accepts_on_average, _accepts_too_much])
@pytest.mark.parametrize("warping", SETTINGS)
def test_a_wrong_acceptance_rule_fails_the_same_test(warping: tuple, wrong: Callable):
    machine = Machine(1)
    right = make_rule(*warping, "rejection", None)

    class Wrong:
        choose = right.choose

        def verify(self, proposal: Proposal, logits: Tensor) -> tuple[Tensor, Tensor]:
            return wrong(proposal.tokens, proposal.probs, warp(logits, *warping))

    out, _ = machine.decode(Wrong(), SAMPLES)
    found, freedom = distance(out, machine.law(warping))
    assert found > chi_square_limit(freedom)


def test_warp_keeps_what_top_k_and_top_p_say():
    probs = torch.tensor([0.1, 0.4, 0.2, 0.3])
    close = lambda found, wanted: torch.testing.assert_close(found, torch.tensor(wanted))  # noqa: E731
    close(warp(probs.log(), 1.0), probs.tolist())
    close(warp(probs.log(), 0.5), (probs**2 / (probs**2).sum()).tolist())
    close(warp(probs.log(), 1.0, 2), [0, 4 / 7, 0, 3 / 7])
    # 0.4 + 0.3 does not reach 0.75, so 0.2 comes in too.
    close(warp(probs.log(), 1.0, None, 0.75), [0, 4 / 9, 2 / 9, 3 / 9])
    close(warp(probs.log(), 1.0, None, 1e-6), [0.0, 1.0, 0.0, 0.0])
    close(warp(probs.log(), 1.0, 3, 0.5), [0, 4 / 7, 0, 3 / 7])


def test_warp_agrees_with_transformers():
    from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(50, 40) * 2
    theirs = TopPLogitsWarper(0.85)(None, TopKLogitsWarper(12)(None, TemperatureLogitsWarper(0.7)(None, logits)))
    torch.testing.assert_close(warp(logits, 0.7, 12, 0.85), theirs.softmax(-1), atol=1e-6, rtol=0)


def test_equal_distributions_accept_everything_and_foreign_drafts_nothing():
    p = torch.rand(64, SLOTS + 1, V).softmax(-1)
    tokens = sample(p[:, :SLOTS])
    assert (reject_or_accept(tokens, p[:, :SLOTS], p)[0] == SLOTS).all()
    only = torch.zeros(64, SLOTS, V)
    only[..., 0] = 1
    never = p.clone()
    never[..., 0] = 0
    accepted, following = reject_or_accept(
        torch.zeros(64, SLOTS, dtype=torch.long), only, never / never.sum(-1, keepdim=True)
    )
    assert (accepted == 0).all()
    assert (following > 0).all()


@pytest.mark.parametrize("sampling", ["rejection", "greedy-draft"])
def test_the_whole_loop_samples_the_first_tokens_of_a_real_target(sampling: str):
    """Through caches, crops and features: first two drafted tokens of a tiny transformer against its own law."""
    target = tiny_target()
    # The last token decides which states are reached; few tokens keep the enumeration small.
    ids, warping, runs = prompt(4), (1.0, 3, None), 400
    drafter = tiny_dflash(target)
    results = speculative_generate_batch(
        target,
        drafter,
        [ids] * runs,
        max_new_tokens=3,
        temperature=1.0,
        top_k=3,
        sampling=sampling,
        stop_token_ids=[],
        generator=torch.Generator().manual_seed(0),
    )
    counts: dict[tuple[int, ...], int] = {}
    for r in results:
        counts[tuple(r.tokens)] = counts.get(tuple(r.tokens), 0) + 1
    chi, cells = 0.0, 0
    law = _enumerate(target, ids, warping)
    assert set(counts) <= set(law)
    rest_expected, rest_found = 0.0, 0
    for tokens, probability in law.items():
        if probability * runs < 5:
            rest_expected, rest_found = rest_expected + probability * runs, rest_found + counts.get(tokens, 0)
        else:
            chi, cells = chi + (counts.get(tokens, 0) - probability * runs) ** 2 / (probability * runs), cells + 1
    if rest_expected:
        chi, cells = chi + (rest_found - rest_expected) ** 2 / rest_expected, cells + 1
    assert cells > 5
    assert chi < chi_square_limit(cells - 1)


def _enumerate(target, ids: Tensor, warping: tuple) -> dict[tuple[int, ...], float]:
    law = {(): 1.0}
    for _ in range(3):
        longer: dict[tuple[int, ...], float] = {}
        for tokens, probability in law.items():
            logits = target(torch.cat([ids, torch.tensor(tokens, dtype=torch.long)])[None]).logits[0, -1]
            probs = warp(logits, *warping)
            longer |= {(*tokens, int(t)): probability * float(probs[t]) for t in torch.nonzero(probs)[:, 0]}
        law = longer
    return law


@pytest.mark.parametrize("plain", [True, False])
def test_sampling_repeats_with_its_generator(plain: bool):
    target = tiny_target()
    drafter = None if plain else tiny_dflash(target)
    first, again, other = (
        speculative_generate(
            target,
            drafter,
            prompt(4),
            max_new_tokens=12,
            temperature=0.8,
            generator=torch.Generator().manual_seed(seed),
        ).tokens
        for seed in (5, 5, 6)
    )
    assert first == again != other
