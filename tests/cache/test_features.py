"""Feature storage: what each kind keeps, also beside massive activations, and folding a sketch back into fc."""

import numpy as np
import pytest
import torch

from cache_builder.features import encode_features, fit_features, principal, reconstruction_error
from specauf.cache import fold_sketch
from specauf.errors import UserError

TAPS, HIDDEN, RANK = 5, 24, 40


def features(tokens: int, seed: int = 0, *, sink: bool = True) -> torch.Tensor:
    """Features as a language model's: low rank and noise, channels of very different size, a sink token every 50."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(20, TAPS * HIDDEN, generator=torch.Generator().manual_seed(99))
    size = torch.logspace(-1, 2, HIDDEN).repeat(TAPS)
    x = torch.randn(tokens, 20, generator=generator) @ mixing + 0.3 * torch.randn(
        tokens, TAPS * HIDDEN, generator=generator
    )
    x = x * size
    if sink:
        x[::50, 2 * HIDDEN + 3 :: HIDDEN] = 30_000.0
    return x


def again(x: torch.Tensor, codec) -> np.ndarray:
    fields = encode_features(x, codec)
    return codec.decode(fields.get("features", fields.get("sketch")), fields.get("feature_scale"))


def test_bf16_is_what_torch_rounds_to():
    x = features(100)
    codec = fit_features(x, "bf16", TAPS)
    np.testing.assert_array_equal(again(x, codec), x.to(torch.bfloat16).float())


def test_int8_keeps_small_channels_beside_massive_ones():
    x = features(1000)
    codec = fit_features(features(1000, seed=1), "int8", TAPS)
    ordinary = torch.arange(1000) % 50 != 0
    exact = x[ordinary]
    error = torch.from_numpy(again(x, codec))[ordinary] - exact
    relative = error.square().mean(0) / exact.square().mean(0)
    assert relative.max() < 1e-3, "every channel, and not only the large ones"


def test_sketch_of_full_rank_loses_only_rounding():
    x = features(500, sink=False)
    codec = fit_features(features(2000, seed=1, sink=False), "sketch", TAPS, TAPS * HIDDEN)
    assert max(reconstruction_error(x, codec)) < 1e-3


def test_sketch_finds_the_signal_beside_massive_activations():
    x = features(500)
    codec = fit_features(features(2000, seed=1), "sketch", TAPS, RANK)
    ordinary = x[torch.arange(500) % 50 != 0]
    assert max(reconstruction_error(ordinary, codec)) < 0.1, "0.3^2 of noise against 20 of signal, in 40 of 120 columns"


def test_basis_is_orthonormal_and_scales_are_positive():
    codec = fit_features(features(2000), "sketch", TAPS, RANK)
    assert codec.basis is not None
    assert codec.channel_scale is not None
    np.testing.assert_allclose(codec.basis.T @ codec.basis, np.eye(RANK), atol=1e-5)
    assert (codec.channel_scale > 0).all()


@pytest.mark.parametrize(("tokens", "width"), [(60, 40), (40, 60), (40, 40), (1, 5)])
def test_the_basis_is_that_of_the_singular_values_for_few_and_for_many_tokens(tokens, width):
    z = torch.from_numpy(np.random.default_rng(0).normal(size=(tokens, width)))
    _, _, right = torch.linalg.svd(z, full_matrices=False)
    least = min(tokens, width)
    for rank in {1, min(3, least), least}:
        found = principal(z, rank)
        assert found.shape == (width, rank)
        torch.testing.assert_close((found.T @ right[:rank].T).abs(), torch.eye(rank, dtype=z.dtype), atol=1e-8, rtol=0)


def test_the_basis_of_rows_that_repeat_is_orthonormal_all_the_same():
    z = torch.ones(4, 9, dtype=torch.float64)
    z[2:, 0] = -1
    found = principal(z, 4)
    torch.testing.assert_close(found.T @ found, torch.eye(4, dtype=z.dtype), atol=1e-10, rtol=0)
    torch.testing.assert_close(found[:, :2] @ found[:, :2].T @ z.T, z.T, atol=1e-10, rtol=0)


def test_folding_gives_the_same_outputs():
    x = features(50, sink=False).double().numpy()
    codec = fit_features(features(2000), "sketch", TAPS, RANK)
    assert codec.basis is not None
    assert codec.channel_scale is not None
    fc_r = np.random.default_rng(0).normal(0, 1, (HIDDEN, RANK))
    y = (x / codec.channel_scale) @ codec.basis.astype(np.float64)
    np.testing.assert_allclose(
        x @ fold_sketch(fc_r, codec.basis, codec.channel_scale).T, y @ fc_r.T, rtol=1e-9, atol=1e-9
    )


def test_a_dead_channel_stays_finite():
    x = features(500)
    x[:, 7] = 0
    for kind, rank in (("int8", 0), ("sketch", 30)):
        assert np.isfinite(again(x, fit_features(x, kind, TAPS, rank))).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["bf16", "int8", "sketch"])
def test_nan_and_inf_are_refused(kind, bad):
    x = features(200)
    codec = fit_features(x, kind, TAPS, 10)
    broken = x.clone()
    broken[3, 5] = bad
    with pytest.raises(UserError, match="NaN or Inf"):
        encode_features(broken, codec)
    if kind != "bf16":
        with pytest.raises(UserError, match="NaN or Inf"):
            fit_features(broken, kind, TAPS, 10)


def test_rank_beyond_the_sample_is_refused():
    with pytest.raises(UserError, match=r"sketch_rank is 60.*allow 1 to 49"):
        fit_features(features(50), "sketch", TAPS, 60)
