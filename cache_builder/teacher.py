"""Running the target over documents whose answers are given: one pass, and the head on supervised rows only."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cache_builder.target import Target


@torch.inference_mode()
def read_all(
    target: Target,
    documents: Sequence[tuple[Int[np.ndarray, " _"], Bool[np.ndarray, " _"]]],
    *,
    batch_tokens: int,
    features: bool = True,
    advance: Callable[[int, float], object] = lambda tokens, documents: None,
) -> list[tuple[Int[np.ndarray, "_ k"], Float[np.ndarray, "_ k"], Float[Tensor, "_ features"] | None]]:
    """Top-k of the supervised rows and features of every token of each document.

    Args:
        target: reads them.
        documents: token ids and loss mask of each; the first token is not supervised.
        batch_tokens: tokens of one pass, padding counted; a longer document goes alone.
        features: keep the taps.
        advance: called with the tokens and documents of each pass.

    Returns:
        For each document, in order: ids and log-probabilities of the rows before its supervised tokens, and features.
    """
    order = sorted(range(len(documents)), key=lambda i: (len(documents[i][0]), i))
    place = target.place_for_features(sum(len(tokens) for tokens, _ in documents))
    results: dict[int, tuple[np.ndarray, np.ndarray, Tensor | None]] = {}
    for numbers in batches(order, [len(tokens) for tokens, _ in documents], batch_tokens):
        width = max(len(documents[i][0]) for i in numbers)
        ids = torch.zeros((len(numbers), width), dtype=torch.int64)
        for row, i in enumerate(numbers):
            ids[row, : len(documents[i][0])] = torch.from_numpy(documents[i][0])
        positions = torch.arange(width, device=target.device).expand(len(numbers), -1)
        # Padding stands behind the tokens, where causal attention never looks: no mask is needed.
        step = target.forward(ids.to(target.device), None, positions, features=features)
        where = [(row, int(at) - 1) for row, i in enumerate(numbers) for at in np.flatnonzero(documents[i][1])]
        index = torch.tensor(where, dtype=torch.int64, device=target.device).reshape(-1, 2)
        best, logprobs = (t.cpu() for t in target.topk(step.hidden[index[:, 0], index[:, 1]]))
        counts = [int(documents[i][1].sum()) for i in numbers]
        kept = None if step.features is None else step.features.to(torch.bfloat16).to(place)
        for row, (i, some, values) in enumerate(
            zip(numbers, best.int().split(counts), logprobs.split(counts), strict=True)
        ):
            length = len(documents[i][0])
            results[i] = (some.numpy(), values.numpy(), None if kept is None else kept[row, :length].clone())
        advance(sum(len(documents[i][0]) for i in numbers), float(len(numbers)))
    return [results[i] for i in range(len(documents))]


def batches(order: list[int], lengths: list[int], batch_tokens: int) -> list[list[int]]:
    """Documents of like length whose padded tokens stay within the limit.

    Args:
        order: the documents, shortest first.
        lengths: of every document, in tokens.
        batch_tokens: tokens of a batch, padding counted; a longer document goes alone.
    """
    filled: list[list[int]] = []
    for i in order:
        if not filled or (len(filled[-1]) + 1) * lengths[i] > batch_tokens:
            filled.append([])
        filled[-1].append(i)
    return filled
