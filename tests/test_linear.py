"""The oneDNN path of linear layers equals torch's own, value and gradient, and is the one in use where it is there."""

import gc
import platform

import pytest
import torch
from torch import nn

from specauf.linear import AVAILABLE, Linear, _packed, linear, use_onednn

SHAPES = [(1,), (7,), (0,), (2, 5), (3, 0, 2)]


def _grads(function: object, *tensors: torch.Tensor | None) -> list[torch.Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in tensors if t is not None]
    out = function(*leaves)  # type: ignore[operator]
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("rows", SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_value_and_gradients_are_those_of_torch(rows: tuple[int, ...], bias: bool) -> None:
    x, weight = torch.randn(*rows, 24), torch.randn(40, 24)
    b = torch.randn(40) if bias else None
    for own, reference in zip(_grads(linear, x, weight, b), _grads(nn.functional.linear, x, weight, b), strict=True):
        torch.testing.assert_close(own, reference, rtol=1e-5, atol=1e-5)


def test_strided_rows_and_gradients_of_one_number() -> None:
    weight = torch.randn(40, 24)
    for x in (torch.randn(24, 6).t(), torch.randn(4, 6, 24)[:, 1:], torch.randn(1, 24).expand(6, 24)):
        torch.testing.assert_close(linear(x, weight), x @ weight.t(), rtol=1e-5, atol=1e-5)
    leaf = torch.randn(6, 24, requires_grad=True)
    linear(leaf, weight).sum().backward()
    torch.testing.assert_close(leaf.grad, weight.sum(0).expand(6, 24), rtol=1e-5, atol=1e-5)


def test_it_is_used_on_x86_in_fp32_only() -> None:
    def name(x: torch.Tensor) -> str:
        return type(linear(x, torch.randn(3, 4, dtype=x.dtype, requires_grad=True)).grad_fn).__name__

    x86 = platform.machine().lower() in {"x86_64", "amd64"}
    assert x86 == AVAILABLE, "where torch no longer has the operator, products would become slower unseen"
    assert (name(torch.randn(2, 4)) == "_OneDnnBackward") == x86
    assert name(torch.randn(2, 4, dtype=torch.float64)) != "_OneDnnBackward"
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(torch.randn(2, 4), torch.randn(3, 4)).dtype == torch.bfloat16


def test_a_model_keeps_its_weights_and_subclasses() -> None:
    class Own(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 4), Own(4, 4), nn.ReLU())
    before, x = model.state_dict(), torch.randn(2, 4)
    expected = model(x)
    use_onednn(model)
    assert [type(m) for m in model] == [Linear, Own, nn.ReLU]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_a_frozen_layer_follows_its_weight_and_its_layout_goes_with_it() -> None:
    layer, x = nn.Linear(24, 40, bias=False).requires_grad_(False), torch.randn(3, 24)
    use_onednn(layer)
    assert (layer.weight.data_ptr() in _packed) == AVAILABLE
    head = layer.weight.detach()  # shares the memory, as a tied head does
    torch.testing.assert_close(linear(x, head), x @ head.t(), rtol=1e-5, atol=1e-5)
    layer.weight.copy_(torch.randn(40, 24))
    torch.testing.assert_close(layer(x), x @ layer.weight.t(), rtol=1e-5, atol=1e-5)
    leaf = x.clone().requires_grad_()
    layer(leaf).sum().backward()
    torch.testing.assert_close(leaf.grad, layer.weight.sum(0).expand(3, 24), rtol=1e-5, atol=1e-5)
    at = layer.weight.data_ptr()
    del layer
    gc.collect()
    assert at not in _packed


def test_weights_made_in_inference_mode() -> None:
    """They count no versions; the builder makes a sketch's basis there."""
    with torch.inference_mode():
        x, weight = torch.randn(5, 8), torch.randn(3, 8)
        layer = nn.Linear(8, 3, bias=False)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        use_onednn(layer)
        torch.testing.assert_close(linear(x, weight), x @ weight.T)
        torch.testing.assert_close(layer(x), x @ weight.T)
