"""Slow, obvious references: Python loops over one block at a time, scalars in float64, gradients by autograd."""

import math

import torch
from torch import Tensor


def prefix_length(valid: Tensor) -> int:
    length = 0
    for flag in valid.tolist():
        if not flag:
            break
        length += 1
    return length


def auf(correct: Tensor, valid: Tensor) -> list[float]:
    weights, alive = [0.0] * len(valid), True
    for k in range(prefix_length(valid)):
        weights[k] = 1.0 if alive else 0.0
        alive = alive and bool(correct[k])
    return weights


def exclusive(correct: Tensor, valid: Tensor) -> list[float]:
    weights = [0.0] * len(valid)
    for k in range(prefix_length(valid)):
        if not correct[k]:
            break
        weights[k] = 1.0
    return weights


def soft_tail(correct: Tensor, valid: Tensor, gamma: float) -> list[float]:
    weights, failed_at = [0.0] * len(valid), None
    for k in range(prefix_length(valid)):
        if failed_at is None and not correct[k]:
            failed_at = k
        weights[k] = 1.0 if failed_at is None else math.exp(-(k - failed_at) / gamma)
    return weights


def uniform(valid: Tensor) -> list[float]:
    return [1.0 if k < prefix_length(valid) else 0.0 for k in range(len(valid))]


def decay(valid: Tensor, gamma: float) -> list[float]:
    return [math.exp(-k / gamma) if k < prefix_length(valid) else 0.0 for k in range(len(valid))]


def survival(alpha: list[float], valid: Tensor) -> list[float]:
    weights, reached = [0.0] * len(valid), 1.0
    for k in range(prefix_length(valid)):
        weights[k] = reached
        reached *= alpha[k]
    return weights


def dpace(prob: list[float], valid: Tensor, alpha: float, part: str) -> list[float]:
    length, weights = prefix_length(valid), [0.0] * len(valid)
    smooth = [(1 - alpha) * p + alpha for p in prob]
    cumulative = [math.prod(smooth[: k + 1]) for k in range(length)]
    for k in range(length):
        value = sum(math.prod(smooth[k + 1 : m + 1]) for m in range(k, length))
        weights[k] = {"full": sum(cumulative[k:]), "cumulative": cumulative[k], "continuation": value}[part]
    return weights


def softmax(logits: Tensor) -> Tensor:
    exps = (logits - logits.detach().max()).exp()
    return exps / exps.sum()


def reduce(
    weights: list[list[float]], losses: list[list[Tensor]], valid: Tensor, reduction: str
) -> tuple[Tensor, float]:
    """Numerator and denominator from per-slot lists."""
    zero = torch.zeros((), dtype=torch.float64)
    if reduction == "token":
        numerator = sum(
            (w * x for ws, xs in zip(weights, losses, strict=True) for w, x in zip(ws, xs, strict=True)), zero
        )
        return numerator, sum(map(sum, weights))
    numerator, blocks = zero, 0
    for ws, xs, v in zip(weights, losses, valid, strict=True):
        total = sum((w * x for w, x in zip(ws, xs, strict=True)), zero)
        if reduction == "block":
            if sum(ws) > 0:
                numerator, blocks = numerator + total / sum(ws), blocks + 1
        else:
            numerator, blocks = numerator + total, blocks + int(prefix_length(v) > 0)
    return numerator, float(blocks)


def sparse(p: Tensor, k: int) -> tuple[list[int], float]:
    """The k most probable tokens and the mass of the others."""
    ids = sorted(range(len(p)), key=lambda v: -p[v].item())[:k]
    return ids, 1 - sum(p[v].item() for v in ids)


def bucketed(p: Tensor, q: Tensor, k: int) -> list[tuple[float, Tensor]]:
    """(p, q) of the k tokens and of the tail bucket."""
    ids, tail = sparse(p, k)
    rest = sum((q[v] for v in range(len(p)) if v not in ids), torch.zeros((), dtype=q.dtype))
    return [(p[v].item(), q[v]) for v in ids] + [(tail, rest)]


def xlog(x, y):
    """x log(x / y) with 0 log 0 = 0."""
    x = torch.as_tensor(x, dtype=torch.float64)
    if x.item() <= 1e-15:
        return torch.zeros((), dtype=torch.float64)
    return x * (x.log() - torch.as_tensor(y, dtype=torch.float64).log())


def acceptance(p: Tensor, q: Tensor, k: int, bound: str) -> Tensor:
    pairs = bucketed(p, q, k)
    chosen = pairs if bound == "upper" else pairs[:-1]
    return sum((qv if qv.item() < pv else qv * 0 + pv for pv, qv in chosen), torch.zeros((), dtype=q.dtype))


def divergence(name: str, p: Tensor | None, q: Tensor, label: int, k: int, bound: str) -> Tensor:
    """One slot's divergence from the drafter's dense q and the target's dense p, of which k tokens are kept."""
    if name == "ce":
        return -q[label].log()
    assert p is not None
    pairs = bucketed(p, q, k)
    alpha = acceptance(p, q, k, bound)
    kl = sum(xlog(pv, qv) for pv, qv in pairs)
    if name == "kl":
        return kl
    if name == "rkl":
        return sum(xlog(qv, pv) for pv, qv in pairs)
    if name == "js":
        return sum((xlog(pv, (pv + qv) / 2) + xlog(qv, (pv + qv) / 2)) / 2 for pv, qv in pairs)
    if name == "tv":
        return 1 - alpha
    if name == "nla":
        return -alpha.log()
    if name == "lk-hybrid":
        ratio = math.exp(-3 * alpha.item())
        return ratio * kl + (1 - ratio) * (1 - alpha)
    if name == "mixture":
        return 0.1 * -q[label].log() + 1.8 * (1 - alpha)
    raise ValueError(name)
