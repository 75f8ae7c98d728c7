"""Run by test_compile.py in a process without run-time shape checks, which torch.compile cannot trace."""

import sys

import torch
from torch._dynamo.utils import counters

from tests.drafters.tiny import batch_of, document, tiny_drafter, tiny_target, vocabulary_of


def check(kind: str) -> None:
    """Compiled layers give the same, without a graph break, and are compiled for the first batch alone."""
    torch.manual_seed(0)
    target = tiny_target()
    vocabulary = vocabulary_of(target)
    plain = tiny_drafter(kind, target).train()
    torch.manual_seed(0)
    compiled = tiny_drafter(kind, target).train()
    compiled.load_state_dict(plain.state_dict())
    compiled.compile_rows()
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    seen = []
    for prompt, answer, anchors in (
        (5, 16, [5, 9, 12]),
        (3, 14, [4, 7]),
        (9, 30, [10, 11, 20, 33, 35]),
        (7, 21, [9, 14]),
    ):
        batch = batch_of([document(target, prompt, answer, prompt)], [anchors])
        values = []
        for drafter in (plain, compiled):
            drafter.zero_grad()
            rows = drafter(batch, vocabulary)
            rows.square().sum().backward()
            values.append((rows, {n: p.grad for n, p in drafter.named_parameters() if p.grad is not None}))
        (rows, gradients), (others, other_gradients) = values
        torch.testing.assert_close(others, rows, rtol=1e-4, atol=1e-5)
        assert other_gradients.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(other_gradients[name], gradient, rtol=1e-3, atol=1e-4, msg=name)
        seen.append(counters["stats"]["unique_graphs"])
    assert not counters["graph_break"]
    assert seen[-1] == seen[0], f"programs after each batch: {seen}"
    print(f"{kind}: {seen[0]} programs")


if __name__ == "__main__":
    check(sys.argv[1])
