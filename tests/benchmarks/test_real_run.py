import sys

import pytest

from benchmarks.real_run import TARGETS, Target, build_flops, parse, sample_tokens, token_bytes, train_flops, work_out


def test_weights_are_those_of_the_models():
    # Published sizes: 8.03, 8.19 and 4.02 billion parameters; norms are too few to count, the 4B's head is tied.
    sizes = {name: t.layers * t.layer + 2 * t.head for name, t in TARGETS.items()}
    assert sizes["Llama-3-8B"] == pytest.approx(8.03e9, rel=2e-3)
    assert sizes["Qwen3-8B"] == pytest.approx(8.19e9, rel=2e-3)
    assert sizes["Qwen3-4B"] - TARGETS["Qwen3-4B"].head == pytest.approx(4.02e9, rel=2e-3)


def test_the_sample_is_as_long_as_deepspecs_size_says(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["real_run"])
    found = work_out(TARGETS["Qwen3-4B"], parse())
    assert found["terabytes"]["DeepSpec"] == pytest.approx(38)
    assert sample_tokens() == pytest.approx(951, abs=1)
    assert found["terabytes"]["sketch"] < 0.1 * found["terabytes"]["DeepSpec"]


def test_only_supervised_tokens_have_rows():
    none, half, all_ = (token_bytes(TARGETS["Llama-3-8B"], share)["sketch"] for share in (0.0, 0.5, 1.0))
    assert none == 4096 + 4 + 5
    assert half - none == pytest.approx(all_ - half)
    assert 65.1 < all_ - none < 80


def test_arithmetic_of_a_tiny_target_by_hand():
    tiny = Target(layers=1, hidden=2, query=2, kv=1, intermediate=3, vocab=5)
    assert tiny.layer == 2 * 4 + 2 * 2 + 18
    assert build_flops(tiny, tokens=4, supervised=0.5) == 4 * (2 * 30 + 4 * 2 * 2) + 2 * 2 * 10
    step = train_flops(tiny, tokens=4, anchors=2, block=3, layers=1, head_rows=2)
    assert step["body"] == 6 * (6 * 30 + 4 * (4 + 4) + 6 * 2 * 2 * (2 + 3))
    assert step["head"] == 4 * 2 * 2 * 10
