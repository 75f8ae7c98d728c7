"""Which tokens the training head keeps."""

import torch
from jaxtyping import Int
from torch import Tensor

from specauf.cache import Cache


def frequent_tokens(cache: Cache, count: int) -> Int[Tensor, " tokens"]:
    """The `count` most frequent tokens among the cache's supervised tokens, as sorted ids.

    Ties go to the smaller id, which byte-pair tokenizers give to the more common token.
    """
    counts = torch.from_numpy(cache.supervised_token_counts())
    order = torch.sort(counts, descending=True, stable=True).indices
    return torch.sort(order[:count]).values
