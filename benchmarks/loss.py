"""LM head and loss: memory and time of the plain form, the chunked form, and AUF on living slots only.

    python -m benchmarks.loss [--blocks 256] [--vocab 49152] ...

Every form runs in a process of its own: forward and backward once, float32. Memory is the process's peak beyond what it
held before (weights, hidden states). Ends with one JSON line.
"""

import argparse
import json
import sys
import time

import torch
from torch import nn

from benchmarks.common import answer, finish, peak_bytes
from specauf.data.batch import BlockTargets
from specauf.objectives import AcceptUntilFail, CrossEntropy, ExponentialDecay, LossOutput, Objective, block_loss

FORMS = {
    "plain": "decay, all logits at once",
    "chunked": "decay, chunked",
    "auf_cold": "AUF at tau about 1",
    "auf_warm": "AUF at tau about 3",
}
ACCURACY = {"auf_cold": 0.05, "auf_warm": 0.68}


def problem(args: argparse.Namespace, accuracy: float) -> tuple[torch.Tensor, nn.Linear, BlockTargets]:
    """Hidden states that lead to the label in a share of the slots, a frozen head, and the labels."""
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(args.hidden, args.vocab, bias=False).requires_grad_(False)
    head.weight.normal_(generator=generator).div_(args.hidden**0.5)
    labels = torch.randint(args.vocab, (args.blocks, args.block_size - 1), generator=generator)
    rows = torch.randn(*labels.shape, args.hidden, generator=generator)
    rows[torch.rand(labels.shape, generator=generator) < accuracy] *= 0
    hits = rows.eq(0).all(-1)
    rows[hits] = 30 * head.weight[labels[hits]]
    return rows.requires_grad_(), head, BlockTargets(labels, torch.ones_like(labels, dtype=torch.bool))


def run(form: str, args: argparse.Namespace) -> dict[str, float]:
    """One form in this process."""
    rows, head, targets = problem(args, ACCURACY.get(form, 0.5))
    auf = Objective(AcceptUntilFail(), CrossEntropy())
    decay = Objective(ExponentialDecay(), CrossEntropy())

    def loss() -> LossOutput:
        if form == "plain":
            return decay.loss(head(rows), targets)
        return block_loss(rows, head, targets, auf if form in ACCURACY else decay, chunk_blocks=args.chunk_blocks)

    head(rows[0, :1])  # libraries allocate their own buffers at the first product
    before, started = peak_bytes(), time.perf_counter()
    out = loss()
    (out.numerator / out.denominator).backward()
    seconds = time.perf_counter() - started
    return {
        "peak_mib": (peak_bytes() - before) / 2**20,
        "seconds": seconds,
        "loss": (out.numerator / out.denominator).item(),
        "gradient_norm": rows.grad.norm().item(),
        "rows_a_block": out.seen.sum().item() / args.blocks,
        "tau": out.summary()["tau"].item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=256)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--vocab", type=int, default=49_152)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--chunk-blocks", type=int, default=32)
    parser.add_argument("--form", choices=FORMS, help="run one form in this process and print its figures as JSON")
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args()
    if args.form:
        print(json.dumps(run(args.form, args)))
        return

    print(f"{args.blocks} blocks x {args.block_size - 1} slots x {args.vocab:,} tokens, hidden {args.hidden}, float32")
    print(f"{'form':28} {'peak MiB':>9} {'seconds':>8} {'rows/block':>11} {'tau':>6}")
    found = {}
    for form, name in FORMS.items():
        command = [sys.executable, "-m", "benchmarks.loss", *sys.argv[1:], "--form", form]
        found[form] = figures = answer(command)
        print(
            f"{name:28} {figures['peak_mib']:9,.0f} {figures['seconds']:8.2f} "
            f"{figures['rows_a_block']:11.2f} {figures['tau']:6.2f}"
        )
    plain, chunked = found["plain"], found["chunked"]
    result = {
        "benchmark": "loss",
        "memory_ratio": chunked["peak_mib"] / plain["peak_mib"],
        "loss_relative_difference": abs(chunked["loss"] - plain["loss"]) / abs(plain["loss"]),
        "gradient_norm_relative_difference": abs(chunked["gradient_norm"] - plain["gradient_norm"])
        / plain["gradient_norm"],
        "speedup_chunked": plain["seconds"] / chunked["seconds"],
        "speedup_auf_cold": plain["seconds"] / found["auf_cold"]["seconds"],
        "threads": torch.get_num_threads(),
        **{f"{form}_{key}": value for form, figures in found.items() for key, value in figures.items()},
    }
    print(f"chunked needs 1/{1 / result['memory_ratio']:.1f} of the plain form's memory")
    finish(result, args.json)


if __name__ == "__main__":
    main()
