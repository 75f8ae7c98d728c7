"""One document between the target's forward pass and the writer."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class BuiltDocument:
    """A tokenised document with everything the target said about it, before quantisation.

    Attributes:
        tokens: the document's token ids.
        loss_mask: True where the token is supervised (an answer's token).
        row_index: positions t whose rows are kept: those with loss_mask[t+1]. Row t describes the token at t+1.
        topk_ids: the target's K most probable tokens at each row, most probable first.
        topk_logprobs: their exact log-probabilities (nats), normalised over the whole vocabulary.
        features: taps of every token, concatenated in tap order; None when the cache keeps no features.
        held_out: the document belongs to the validation split.
    """

    tokens: Int[np.ndarray, " tokens"]
    loss_mask: Bool[np.ndarray, " tokens"]
    row_index: Int[np.ndarray, " rows"]
    topk_ids: Int[np.ndarray, "rows k"]
    topk_logprobs: Float[np.ndarray, "rows k"]
    features: Float[Tensor, "tokens features"] | None
    held_out: bool = False
