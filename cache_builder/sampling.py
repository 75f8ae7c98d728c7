"""Sampled answers, drawn from the entries that the cache keeps anyway."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from specauf.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Attributes:
        temperature: divides the log-probabilities; at least 0.001.
        top_k: draw from so many of the most probable tokens; at most the k that are kept.
        top_p: and of these from the fewest that reach this share.
        seed: of the random numbers.
    """

    temperature: float
    top_k: int
    top_p: float
    seed: int

    def require_valid(self, k: int) -> None:
        """Check the settings.

        Raises:
            UserError: naming the one that is out of range.
        """
        if not 1e-3 <= self.temperature < math.inf:
            raise UserError(f"temperature is {self.temperature}, expected at least 0.001; 0 answers greedily")
        if not 0 <= self.seed < 2**64:
            raise UserError(f"seed is {self.seed}, expected 0 to {2**64 - 1}")
        if not 1 <= self.top_k <= k:
            raise UserError(f"sample_top_k is {self.top_k}, expected 1 to the {k} kept log-probabilities: raise --k")
        if not 0 < self.top_p <= 1:
            raise UserError(f"sample_top_p is {self.top_p}, expected above 0 and at most 1")

    def uniforms(self, numbers: Sequence[int], count: int) -> Float[Tensor, "documents count"]:
        """Random numbers of some documents: each document's depend on its number and the seed alone."""
        # Of plain numbers from 2**63 on numpy makes floats, and neighbouring seeds would be one.
        keys = [np.array([self.seed, n], np.uint64) for n in numbers]
        rows = [np.random.Generator(np.random.Philox(key=key)).random(count) for key in keys]
        return torch.from_numpy(np.stack(rows))

    def choose(
        self, ids: Int[Tensor, "rows k"], logprobs: Float[Tensor, "rows k"], uniform: Float[Tensor, " rows"]
    ) -> Int[Tensor, " rows"]:
        """Draw a token of each row by inverting its cumulative distribution.

        Args:
            ids: tokens, most probable first.
            logprobs: theirs.
            uniform: a number in [0, 1) for each row.
        """
        probability = (logprobs[:, : self.top_k].double() / self.temperature).softmax(-1)
        before = probability.cumsum(-1) - probability
        probability = probability.masked_fill(before >= self.top_p, 0)
        cumulative = (probability / probability.sum(-1, keepdim=True)).cumsum(-1)
        # Rounding may leave the last sum below 1: the last token with any probability then stands for the rest.
        last = (probability > 0).sum(-1) - 1
        drawn = torch.minimum((cumulative <= uniform.double()[:, None]).sum(-1), last)
        return ids.gather(-1, drawn[:, None])[:, 0]
