"""The mathematics of sampled decoding: warped distributions and the acceptance rule."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def warp(
    logits: Float[Tensor, "*rows vocab"], temperature: float, top_k: int | None = None, top_p: float | None = None
) -> Float[Tensor, "*rows vocab"]:
    """The distribution that sampling draws from: temperature, then top-k, then top-p, then renormalised.

    Args:
        logits: raw ones.
        temperature: above 0.
        top_k: keep the k most probable tokens; all when None.
        top_p: keep the most probable tokens until they hold this mass, the one that reaches it included; all when None.
    """
    scaled = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        least = scaled.topk(top_k, dim=-1).values[..., -1:]
        scaled = scaled.masked_fill(scaled < least, -torch.inf)
    probs = scaled.softmax(-1)
    if top_p is None or top_p >= 1.0:
        return probs
    ordered, index = probs.sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    probs = torch.zeros_like(probs).scatter(-1, index, ordered.masked_fill(before >= top_p, 0.0))
    return probs / probs.sum(-1, keepdim=True)


def sample(probs: Float[Tensor, "*rows vocab"], generator: torch.Generator | None = None) -> Int[Tensor, "*rows"]:
    """One token from each distribution."""
    flat = probs.reshape(-1, probs.shape[-1])
    return torch.multinomial(flat, 1, generator=generator).view(probs.shape[:-1])


def leading(matches: Tensor) -> Int[Tensor, " prompts"]:
    """How many matches in a row each prompt has from the first slot on."""
    return matches.long().cumprod(1).sum(1)


def reject_or_accept(
    tokens: Int[Tensor, "prompts slots"],
    draft: Float[Tensor, "prompts slots vocab"],
    target: Float[Tensor, "prompts slots_plus_1 vocab"],
    generator: torch.Generator | None = None,
) -> tuple[Int[Tensor, " prompts"], Int[Tensor, " prompts"]]:
    """Rejection sampling (Leviathan et al., arXiv 2211.17192, algorithm 1): the output has the target's law.

    Token x of slot k is accepted with probability min(1, p_k(x) / q_k(x)). At the first rejection the next token comes
    from norm(max(0, p - q)); when all are accepted, from the target's distribution behind the last.

    Args:
        tokens: drafted tokens, drawn from `draft`.
        draft: q of each slot.
        target: p of each slot, and of the position behind the last.
        generator: of the random numbers.

    Returns:
        accepted: A of each prompt.
        following: the token behind the accepted ones.
    """
    p, q = (probs[:, : tokens.shape[1]].gather(2, tokens[..., None])[..., 0] for probs in (target, draft))
    uniform = torch.rand(p.shape, generator=generator, device=p.device)
    accepted = leading(uniform * q < p)
    row = torch.arange(len(tokens), device=p.device)
    final = target[row, accepted]
    # Behind the last slot there is no draft to subtract.
    minus = torch.cat([draft, torch.zeros_like(target[:, :1])], 1)[row, accepted]
    residual = (final - minus).clamp(min=0)
    # p = q leaves nothing over: a rejection there is rounding alone, and the token then comes from p.
    residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, final)
    return accepted, sample(residual, generator)
