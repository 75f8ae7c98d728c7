"""The oneDNN path of linear layers equals torch's own, value and gradient, and is the one in use where it is there."""

import gc
import itertools
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import specauf.linear
from cache_builder.driver import build
from specauf.cache import open_cache
from specauf.decoding import speculative_generate
from specauf.linear import AVAILABLE, SMALL, Linear, _packed, linear, use_onednn
from tests.builder.conftest import tiny_target_dir, write_jsonl  # noqa: F401  (a fixture)
from tests.builder.test_build import config
from tests.drafters.tiny import greedy_answer, prompt, tiny_dflash, tiny_target
from tests.training.conftest import tiny_cache  # noqa: F401  (a fixture)
from tests.training.running import fit_here, logged

IN, OUT = 208, 320
assert IN * OUT >= SMALL
SHAPES = [(1,), (7,), (0,), (2, 5), (3, 0, 2)]


def _grads(function: object, *tensors: torch.Tensor | None) -> list[torch.Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in tensors if t is not None]
    out = function(*leaves)  # type: ignore[operator]
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("rows", SHAPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("avx512", [False, True])
def test_value_and_gradients_are_those_of_torch(
    rows: tuple[int, ...], bias: bool, avx512: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specauf.linear.AVX512", avx512)
    x, weight = torch.randn(*rows, IN), torch.randn(OUT, IN)
    b = torch.randn(OUT) if bias else None
    for own, reference in zip(_grads(linear, x, weight, b), _grads(nn.functional.linear, x, weight, b), strict=True):
        torch.testing.assert_close(own, reference, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("needed", [n for n in itertools.product([False, True], repeat=3) if any(n)])
def test_whatever_needs_a_gradient_gets_it(needed: tuple[bool, ...]) -> None:
    given = torch.randn(3, IN), torch.randn(OUT, IN), torch.randn(OUT)
    grads = []
    for function in (linear, nn.functional.linear):
        leaves = [t.clone().requires_grad_(need) for t, need in zip(given, needed, strict=True)]
        function(*leaves).square().sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for own, reference in zip(*grads, strict=True):
        torch.testing.assert_close(own, reference, rtol=1e-4, atol=1e-2)


def test_gradients_of_one_number() -> None:
    weight, leaf = torch.randn(OUT, IN), torch.randn(6, IN, requires_grad=True)
    linear(leaf, weight).sum().backward()
    torch.testing.assert_close(leaf.grad, weight.sum(0).expand(6, IN), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("weight", [(OUT, IN), (OUT, IN + 1), (2 * OUT, IN)])
@pytest.mark.parametrize("avx512", [False, True])
def test_strided_operands(weight: tuple[int, int], avx512: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Domino's head makes them; weights of oneDNN have no gaps, for which it has only a slow reference."""
    monkeypatch.setattr("specauf.linear.AVX512", avx512)
    given, own = [], specauf.linear._product
    monkeypatch.setattr("specauf.linear._product", lambda *args: given.append(args[1]) or own(*args))
    whole = torch.randn(weight)
    apart = whole[:: weight[0] // OUT, :IN]
    rows = (torch.randn(IN, 6).t(), torch.randn(4, 6, IN)[:, 1:], torch.randn(1, IN).expand(6, IN))
    for x in (*rows, torch.randn(6, IN + 1)[:, 1:]):
        results = []
        for function in (linear, nn.functional.linear):
            leaves = [t.detach().requires_grad_() for t in (x, apart)]  # without a copy: the strides stay
            out = function(*leaves)
            (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
            results.append([out.detach(), *(leaf.grad for leaf in leaves)])
        for ours, reference in zip(*results, strict=True):
            torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-4)
    assert bool(given) == AVAILABLE
    assert all(w.is_contiguous() or w.t().is_contiguous() for w in given)


def test_it_is_used_on_x86_in_fp32_for_all_but_small_weights_only() -> None:
    def name(x: torch.Tensor, outputs: int = OUT) -> str:
        return type(linear(x, torch.randn(outputs, IN, dtype=x.dtype, requires_grad=True)).grad_fn).__name__

    x86 = platform.machine().lower() in {"x86_64", "amd64"}
    assert x86 == AVAILABLE, "where torch no longer has the operator, products would become slower unseen"
    assert (name(torch.randn(2, IN)) == "_OneDnnBackward") == x86
    assert name(torch.randn(2, IN), SMALL // IN) != "_OneDnnBackward"
    assert name(torch.randn(2, IN, dtype=torch.float64)) != "_OneDnnBackward"
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(torch.randn(2, IN), torch.randn(OUT, IN)).dtype == torch.bfloat16


def test_a_model_keeps_its_weights_and_subclasses() -> None:
    class Own(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(IN, OUT), Own(OUT, 4), nn.ReLU())
    before, x = model.state_dict(), torch.randn(2, IN)
    expected = model(x)
    use_onednn(model)
    assert [type(m) for m in model] == [Linear, Own, nn.ReLU]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-4)


def test_a_frozen_layer_follows_its_weight_and_its_layout_goes_with_it() -> None:
    layer, x = nn.Linear(IN, OUT, bias=False).requires_grad_(False), torch.randn(3, IN)
    use_onednn(layer)
    assert (layer.weight.data_ptr() in _packed) == AVAILABLE
    head = layer.weight.detach()  # shares the memory, as a tied head does
    torch.testing.assert_close(linear(x, head), x @ head.t(), rtol=1e-5, atol=1e-4)
    layer.weight.copy_(torch.randn(OUT, IN))
    torch.testing.assert_close(layer(x), x @ layer.weight.t(), rtol=1e-5, atol=1e-4)
    leaf = x.clone().requires_grad_()
    layer(leaf).sum().backward()
    torch.testing.assert_close(leaf.grad, layer.weight.sum(0).expand(3, IN), rtol=1e-5, atol=1e-4)
    at = layer.weight.data_ptr()
    del layer
    gc.collect()
    assert at not in _packed


def test_a_layout_is_not_taken_for_another_weight_in_its_memory() -> None:
    kept, again = [], 0
    for _ in range(40):
        old = nn.Linear(IN, OUT, bias=False).requires_grad_(False)
        use_onednn(old)
        at = old.weight.data_ptr()
        kept.append(old.to(torch.bfloat16))  # keeps the parameter, and lets go of its memory
        new = nn.Linear(IN, OUT, bias=False).requires_grad_(False)
        again += new.weight.data_ptr() == at
        x = torch.randn(3, IN)
        torch.testing.assert_close(linear(x, new.weight), x @ new.weight.t(), rtol=1e-5, atol=1e-4)
        del new
    assert again, "no memory was used again, so nothing was tried"


def test_a_layout_is_not_taken_for_its_transpose() -> None:
    layer, x = nn.Linear(OUT, OUT, bias=False).requires_grad_(False), torch.randn(3, OUT)
    use_onednn(layer)
    torch.testing.assert_close(linear(x, layer.weight.t()), x @ layer.weight, rtol=1e-5, atol=1e-4)


def test_a_change_through_data_is_seen_when_told() -> None:
    layer, x = nn.Linear(IN, OUT, bias=False).requires_grad_(False), torch.randn(3, IN)
    use_onednn(layer)
    layer.weight.data.mul_(3)
    use_onednn(layer)
    torch.testing.assert_close(layer(x), x @ layer.weight.t(), rtol=1e-5, atol=1e-4)
    at = layer.weight.data_ptr()
    del layer
    gc.collect()
    assert at not in _packed


def test_weights_made_in_inference_mode() -> None:
    """They count no versions; the builder makes a sketch's basis there."""
    with torch.inference_mode():
        x, weight = torch.randn(5, IN), torch.randn(OUT, IN)
        layer = nn.Linear(IN, OUT, bias=False)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        use_onednn(layer)
        torch.testing.assert_close(linear(x, weight), x @ weight.T, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(layer(x), x @ weight.T, rtol=1e-5, atol=1e-4)


# All layers of tiny models are small; these run whole programs on the path that real ones take.


@pytest.fixture
def onednn_for_all(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Turns it on; at the end it must have been used."""
    used = []
    own = specauf.linear._product

    def turn_on() -> None:
        monkeypatch.setattr("specauf.linear.SMALL", 0)
        monkeypatch.setattr("specauf.linear._product", lambda *args: used.append(1) or own(*args))

    yield turn_on
    assert bool(used) == AVAILABLE


def test_a_build_on_either_path_is_the_same(
    tiny_target_dir: Path,  # noqa: F811
    tmp_path: Path,
    onednn_for_all: Callable[[], None],
) -> None:
    rows = [{"prompt": f"question number {i}"} for i in range(12)]
    corpus = write_jsonl(tmp_path / "corpus.jsonl", rows)
    changes = {"features": "sketch", "sketch_rank": 8}
    build(config(tiny_target_dir, corpus, tmp_path / "torch", **changes))
    onednn_for_all()
    build(config(tiny_target_dir, corpus, tmp_path / "onednn", **changes))
    caches = [open_cache(str(tmp_path / name)).documents() for name in ("torch", "onednn")]
    count = 0
    for theirs, ours in zip(*caches, strict=True):
        assert np.array_equal(ours.tokens, theirs.tokens)
        np.testing.assert_allclose(ours.topk_logprobs, theirs.topk_logprobs, atol=0.02)
        count += 1
    assert count > 6


def test_training_on_either_path_is_the_same(
    tiny_cache: Path,  # noqa: F811
    tmp_path: Path,
    onednn_for_all: Callable[[], None],
) -> None:
    options = ("--model.loss=auf", "--trainer.max_steps=4")
    assert fit_here(tiny_cache, tmp_path / "torch", *options) == 0
    onednn_for_all()
    assert fit_here(tiny_cache, tmp_path / "onednn", *options) == 0
    assert logged(tmp_path / "onednn") == pytest.approx(logged(tmp_path / "torch"), rel=1e-4)


def test_decoding_gives_what_generate_gives(onednn_for_all: Callable[[], None]) -> None:
    target = tiny_target("llama")
    ids = prompt(7)
    expected = greedy_answer(target, ids, 24)
    drafter = tiny_dflash(target)
    onednn_for_all()
    for model in (target, drafter):
        use_onednn(model)
    assert speculative_generate(target, drafter, ids, max_new_tokens=24).tokens == expected
