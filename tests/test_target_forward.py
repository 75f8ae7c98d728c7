"""A target's key-value cache has two names, by the version of transformers and the model's own code."""

import functools

import pytest
import torch
from torch import nn

from specauf.target_forward import cache_argument


class Renamed(nn.Module):
    def forward(self, input_ids=None, cache=None, **kwargs):
        return cache


class Before(nn.Module):
    def forward(self, input_ids=None, past_key_values=None, **kwargs):
        return past_key_values


class Wrapped(Renamed):
    """As transformers' decorators leave it."""

    @functools.wraps(Renamed.forward)
    def forward(self, *args, **kwargs):
        return Renamed.forward(self, *args, **kwargs)


@pytest.mark.parametrize("kind", [Renamed, Before, Wrapped])
def test_the_name_it_is_given_by_is_the_one_the_forward_reads(kind):
    model, held = kind(), object()
    assert model(torch.zeros(1), **{cache_argument(model): held}) is held
