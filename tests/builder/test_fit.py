"""What is fitted on which tokens, and that the error that a build prints is one on tokens which no fit saw."""

from typing import Any

import numpy as np
import pytest

from cache_builder.features import fit_features, reconstruction_error
from cache_builder.fit import Fitting, loss_text
from specauf.errors import UserError
from tests.cache.test_features import RANK, TAPS, features


def fitting(fit_tokens: int, kind: Any = "sketch", rank: int = RANK) -> Fitting:
    return Fitting(kind, TAPS, rank, fit_tokens, "raise --documents_per_shard")


def same_fit(found: Any, expected: Any) -> None:
    for name in ("channel_scale", "basis"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


@pytest.mark.parametrize("tokens", [100, 1000])
def test_few_tokens_are_all_fitted_and_the_error_is_that_of_others(tokens: int) -> None:
    """A hundred tokens in forty columns: on these very tokens the sketch loses next to nothing."""
    whole = features(tokens)
    codec, errors = fitting(1000).measured(whole.split(30))
    same_fit(codec, fit_features(whole, "sketch", TAPS, RANK))
    others = reconstruction_error(features(4000, seed=7), codec)
    assert errors == pytest.approx(others, rel=0.5)
    if tokens == 100:
        assert max(reconstruction_error(whole, codec)) < min(errors) / 2


def test_what_the_fit_leaves_out_is_measured() -> None:
    whole = features(1500)
    codec, errors = fitting(1000).measured([whole])
    same_fit(codec, fit_features(whole[:1000], "sketch", TAPS, RANK))
    assert errors == reconstruction_error(whole[1000::2], codec)


@pytest.mark.parametrize("kind", ["int8", "sketch"])
def test_of_many_tokens_some_are_fitted_and_those_between_are_measured(kind: Any) -> None:
    whole = features(2100)
    codec, errors = fitting(500, kind).measured([whole])
    same_fit(codec, fit_features(whole[::4][:500], kind, TAPS, RANK))
    assert errors == reconstruction_error(whole[2::16], codec)
    same_fit(fitting(500, kind).codec([whole]), codec)


@pytest.mark.parametrize(("kind", "tokens"), [("int8", 1), ("sketch", 50)])
def test_an_error_that_cannot_be_measured_is_none(kind: Any, tokens: int) -> None:
    codec, errors = fitting(1000, kind).measured([features(tokens, sink=False)])
    assert errors == []
    assert "error not measured" in loss_text(codec, errors, range(TAPS))


def test_plain_features_are_not_fitted() -> None:
    for kind in ("none", "bf16"):
        codec, errors = fitting(1000, kind).measured([])
        assert loss_text(codec, errors, range(TAPS)) == ""


@pytest.mark.parametrize(
    ("fit_tokens", "says"), [(1000, "or raise --documents_per_shard"), (40, "or raise --fit_tokens")]
)
def test_too_few_tokens_say_what_gives_more(fit_tokens: int, says: str) -> None:
    with pytest.raises(UserError, match=f"sketch_rank is 60, .* sample tokens .*: lower --sketch_rank, {says}$"):
        fitting(fit_tokens, rank=60).codec([features(50)])
