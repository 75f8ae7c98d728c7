"""How drafted tokens are chosen and verified: greedy, rejection sampling, greedy drafts with sampled verification."""

import math
from typing import Literal, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from specauf.decoding.sampling import leading, reject_or_accept, sample, warp
from specauf.drafters.proposal import Proposal, greedy
from specauf.errors import UserError

Sampling = Literal["rejection", "greedy-draft"]
LEAST_TEMPERATURE = 1e-3  # below it float32 logits over the temperature overflow or leave one token anyway
Verdict = tuple[Int[Tensor, " prompts"], Int[Tensor, " prompts"]]


@runtime_checkable
class Rule(Protocol):
    """Chooses drafted tokens, and decides about them."""

    def choose(self, logits: Float[Tensor, "*rows vocab"]) -> tuple[Tensor, Tensor | None]:
        """A drafted token from draft logits, and the distribution it was drawn from."""
        ...

    def first(self, logits: Float[Tensor, "prompts vocab"]) -> Int[Tensor, " prompts"]:
        """The token behind the prompt."""
        ...

    def verify(self, proposal: Proposal, logits: Float[Tensor, "prompts slots_plus_1 vocab"]) -> Verdict:
        """How many drafted tokens are accepted, and the token behind them."""
        ...


class Greedy:
    """Accept while the draft is the target's most probable token: the output is that of plain greedy decoding."""

    choose = staticmethod(greedy)

    def first(self, logits: Float[Tensor, "prompts vocab"]) -> Int[Tensor, " prompts"]:
        """Argmax."""
        return logits.argmax(-1)

    def verify(self, proposal: Proposal, logits: Float[Tensor, "prompts slots_plus_1 vocab"]) -> Verdict:
        """Compare with the argmaxes."""
        return _match(proposal.tokens, logits.argmax(-1))


class _Sampled:
    """Draws from the warped distribution.

    Args:
        temperature: above 0.
        top_k: see `warp`.
        top_p: see `warp`.
        generator: of the random numbers.
    """

    def __init__(
        self, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
    ) -> None:
        self.warping = (temperature, top_k, top_p)
        self.generator = generator

    def first(self, logits: Float[Tensor, "prompts vocab"]) -> Int[Tensor, " prompts"]:
        """A sample."""
        return sample(warp(logits, *self.warping), self.generator)


class Rejection(_Sampled):
    """Draft from q, accept with probability min(1, p/q): acceptance is sum(min(p, q)) a slot."""

    def choose(self, logits: Float[Tensor, "*rows vocab"]) -> tuple[Tensor, Tensor | None]:
        """A sample of the draft's distribution, warped as the target's."""
        probs = warp(logits, *self.warping)
        return sample(probs, self.generator), probs

    def verify(self, proposal: Proposal, logits: Float[Tensor, "prompts slots_plus_1 vocab"]) -> Verdict:
        """Rejection sampling."""
        target = warp(logits, *self.warping)
        draft = target[:, :0] if proposal.probs is None else proposal.probs  # None: plain decoding, nothing drafted
        return reject_or_accept(proposal.tokens, draft, target, self.generator)


class GreedyDraft(_Sampled):
    """Draft argmaxes, accept while a sample of the target equals them, as z-lab's code did at first.

    The law is the target's too; acceptance is p(argmax q) a slot, so figures do not compare with rejection sampling's.
    """

    choose = staticmethod(greedy)

    def verify(self, proposal: Proposal, logits: Float[Tensor, "prompts slots_plus_1 vocab"]) -> Verdict:
        """Compare with one sample a position."""
        return _match(proposal.tokens, sample(warp(logits, *self.warping), self.generator))


def _match(tokens: Int[Tensor, "prompts slots"], posterior: Int[Tensor, "prompts slots_plus_1"]) -> Verdict:
    accepted = leading(tokens == posterior[:, :-1])
    return accepted, posterior.gather(1, accepted[:, None])[:, 0]


def make_rule(
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    sampling: Sampling,
    generator: torch.Generator | None,
) -> Rule:
    """The rule for decoding settings; temperature 0 is greedy.

    Raises:
        UserError: a setting is out of its range.
    """
    if not (temperature == 0 or LEAST_TEMPERATURE <= temperature < math.inf):
        raise UserError(f"temperature: {temperature} found, 0 (greedy) or a number from {LEAST_TEMPERATURE} expected")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k: {top_k} found, at least 1 expected; leave it out to keep all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p: {top_p} found, a number above 0 and at most 1 expected")
    if sampling not in get_args(Sampling):
        raise UserError(f"sampling: {sampling} found, one of {', '.join(get_args(Sampling))} expected")
    if temperature == 0:
        return Greedy()
    if sampling == "greedy-draft":
        return GreedyDraft(temperature, top_k, top_p, generator)
    return Rejection(temperature, top_k, top_p, generator)
