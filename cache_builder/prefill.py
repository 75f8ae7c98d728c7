"""Running prompts through the target before it answers: what prompts share is run once, and padding hardly at all."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from cache_builder.kv_cache import SlotCache
from cache_builder.target import Target

# Tokens of one pass: enough for the matrix units, few enough that activations stay small and lengths alike.
PREFILL_TOKENS = 2048
# A shorter beginning is not worth a pass of its own.
MIN_PREFIX = 8


@dataclass(frozen=True)
class Prefix:
    """What all prompts begin with: a system prompt, mostly.

    Attributes:
        length: tokens.
        cached: its keys and values.
        features: its taps; None when they are not wanted.
    """

    length: int
    cached: list[Tensor]
    features: Float[Tensor, "tokens features"] | None


def common_prefix(
    target: Target, cache: SlotCache, prompts: Sequence[Int[np.ndarray, " _"]], place: torch.device | None
) -> Prefix | None:
    """Run the tokens that all prompts begin with; None when they are too few.

    Every prompt keeps at least its last token, whose hidden state the answer starts from. The taps go to `place`; None
    when they are not wanted.
    """
    if len(prompts) < 2:
        return None
    shortest = min(map(len, prompts)) - 1
    heads = np.stack([p[:shortest] for p in prompts])
    differs = (heads != heads[0]).any(0)
    length = int(differs.argmax()) if differs.any() else shortest
    if length < MIN_PREFIX:
        return None
    ids = torch.from_numpy(heads[:1, :length]).to(target.device)
    cache.look(slice(0, 1), 0, 0)
    positions = torch.arange(length, device=target.device)[None]
    step = target.forward(ids, None, positions, cache=cache, features=place is not None)
    kept = None if step.features is None or place is None else step.features[0].to(torch.bfloat16).to(place)
    return Prefix(length, cache.take(0, slice(0, length)), kept)


def prefill(
    target: Target,
    cache: SlotCache,
    prefix: Prefix | None,
    tokens: Int[Tensor, "rows room"],
    lengths: Int[Tensor, " rows"],
    features: Float[Tensor, "rows room features"] | None,
) -> Float[Tensor, "rows hidden"]:
    """Fill the cache with prompts, right-aligned to the longest one.

    Args:
        target: runs them.
        cache: takes them; row r's tokens stand in the columns from max(lengths) - lengths[r] on.
        prefix: what they begin with.
        tokens: prompts, left-aligned, by rising length.
        lengths: of the prompts.
        features: filled with the prompts' taps, left-aligned; None when they are not wanted.

    Returns:
        Hidden states of the last tokens.
    """
    width, known = int(lengths.max()), 0 if prefix is None else prefix.length
    last = []
    for rows in _groups((lengths - known).tolist()):
        counts = lengths[rows]
        first, longest = width - int(counts.max()), int(counts.max()) - known
        if prefix is not None:
            for row, count in enumerate(counts.tolist(), rows.start):
                cache.put(row, width - count, prefix.cached)
                if features is not None and prefix.features is not None:
                    features[row, :known] = prefix.features
        # Shorter rows repeat the end of the prefix: what they write to the cache again is what stands there.
        positions = counts[:, None] - longest + torch.arange(longest)
        columns = torch.arange(first, width)
        mask = (columns >= (width - counts)[:, None]).to(target.device)
        sources = positions.clamp_min(0)
        ids = tokens[rows].gather(1, sources).to(target.device)
        cache.look(rows, first, width - first - longest)
        step = target.forward(ids, mask, sources.to(target.device), cache=cache, features=features is not None)
        last.append(step.hidden[:, -1])
        if features is not None and step.features is not None:
            kept = step.features.to(torch.bfloat16).to(features.device)
            for row, start in enumerate(positions[:, 0].tolist()):
                features[rows.start + row, max(0, start) : counts[row]] = kept[row, max(0, -start) :]
    return torch.cat(last)


def _groups(lengths: list[int]) -> list[slice]:
    """Runs of rows of rising length whose padded tokens stay below `PREFILL_TOKENS`, at least one row each."""
    groups, start = [], 0
    for row, length in enumerate(lengths):
        if row > start and (row + 1 - start) * length > PREFILL_TOKENS:
            groups.append(slice(start, row))
            start = row
    groups.append(slice(start, len(lengths)))
    return groups
