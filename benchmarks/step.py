"""A training step: memory and time against anchors and packed length, for each kind of drafter.

    python -m benchmarks.step [--drafter dflash] [--loss auf] [--anchors 16 64 256] [--length 512 2048 8192] ...

Every setting runs in a process of its own: forward, loss and backward, float32, median of some repetitions after one to
warm up. Memory is the peak beyond weights and batch: the process's on a CPU, the allocator's on CUDA. The target's
sizes are SmolLM2's unless given. Ends with one JSON line.
"""

import argparse
import json
import statistics
import sys
import time

import torch

from benchmarks.common import answer, finish, peak_bytes
from specauf.data.batch import BlockBatch, BlockTargets
from specauf.drafters import (
    DFlash2Config,
    DFlash2Drafter,
    DFlashDrafter,
    DominoConfig,
    DominoDrafter,
    Drafter,
    DrafterConfig,
    DSparkConfig,
    DSparkDrafter,
    MaskedConfig,
    MaskedDrafter,
    TargetVocabulary,
)
from specauf.objectives import AcceptUntilFail, CrossEntropy, ExponentialDecay, Objective
from specauf.objectives.support import branch_losses

LOSSES = {"auf": AcceptUntilFail, "decay": ExponentialDecay}


def drafter_of(args: argparse.Namespace) -> Drafter:
    """A random drafter with the target's sizes."""
    target = {
        "hidden_size": args.hidden,
        "num_hidden_layers": 30,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.kv_heads,
        "head_dim": args.hidden // args.heads,
        "intermediate_size": args.intermediate,
        "vocab_size": args.vocab,
        "rope_theta": 1e5,
    }
    common = {"num_hidden_layers": args.layers, "block_size": args.block_size, "mask_token_id": 16}
    taps = (1, 7, 14, 20, 27)
    remember = {"activation_checkpointing": args.checkpointing}
    if args.drafter == "masked":
        return MaskedDrafter(MaskedConfig.from_target(target, taps=(), feature_dim=0, **common), **remember)
    if args.drafter == "dflash2":
        return DFlash2Drafter(DFlash2Config.from_target(target, taps=taps, **common), **remember)
    if args.drafter == "dspark":
        return DSparkDrafter(DSparkConfig.from_target(target, taps=taps, **common), **remember)
    if args.drafter == "domino":
        return DominoDrafter(DominoConfig.from_target(target, taps=taps, **common), **remember)
    return DFlashDrafter(DrafterConfig.from_target(target, taps=taps, **common), **remember)


def batch_of(args: argparse.Namespace, drafter: Drafter, anchors: int, length: int) -> BlockBatch:
    """Documents of `args.document` tokens packed to a length, with anchors spread evenly."""
    generator = torch.Generator().manual_seed(0)
    offsets = torch.tensor([*range(0, length, min(args.document, length)), length])
    tokens = torch.randint(0, args.vocab, (length,), generator=generator)
    places = torch.randperm(length - 1, generator=generator)[:anchors].sort().values + 1
    slots = places[:, None] + torch.arange(1, args.block_size)
    owner = torch.searchsorted(offsets, places, right=True) - 1
    valid = slots < offsets[owner + 1][:, None]
    labels = torch.where(valid, tokens[slots.clamp(max=length - 1)], 0)
    width = drafter.config.feature_dim
    features = torch.randn(length, width, generator=generator) if drafter.needs_features else None
    return BlockBatch(tokens, offsets, features, places, owner, BlockTargets(labels, valid))


def measure(args: argparse.Namespace, anchors: int, length: int) -> dict[str, float]:
    """Peak bytes beyond weights and batch, and seconds of each repetition."""
    torch.manual_seed(0)
    drafter = drafter_of(args).to(args.device).train()
    vocabulary = TargetVocabulary(torch.randn(args.vocab, args.hidden) / args.hidden**0.5).to(args.device)
    batch = batch_of(args, drafter, anchors, length).to(args.device)
    objective = Objective(LOSSES[args.loss](), CrossEntropy())
    for parameter in drafter.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before, seconds = peak_bytes(args.device), []
    for _ in range(args.repeat + 1):
        started = time.perf_counter()
        total = torch.zeros((), device=args.device)
        branches = drafter.branches(batch, vocabulary, 0.5)
        for branch, out in branch_losses(branches, batch.targets, objective, chunk_blocks=args.chunk):
            total = total + branch.weight * out.numerator / out.denominator
        total.backward()
        if args.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    del seconds[0]
    return {
        "anchors": anchors,
        "packed": length,
        "mib": (peak_bytes(args.device) - before) / 2**20,
        "seconds": statistics.median(seconds),
        "fastest": min(seconds),
        "slowest": max(seconds),
        "weights_mib": sum(p.numel() * p.element_size() for p in drafter.parameters()) / 2**20,
    }


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drafter", choices=("dflash", "dflash2", "domino", "dspark", "masked"), default="dflash")
    parser.add_argument("--loss", choices=sorted(LOSSES), default="auf")
    parser.add_argument("--anchors", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--length", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--document", type=int, default=256, help="tokens of a document")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--intermediate", type=int, default=1536)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--chunk", type=int, default=64, help="blocks whose logits exist at the same time")
    parser.add_argument("--checkpointing", action="store_true", help="recompute layers in the backward pass")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--one", type=int, nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run every setting and print the table."""
    args = parse()
    if args.one:
        print(json.dumps(measure(args, *args.one)))
        return
    rows = []
    print(f"{'anchors':>8} {'packed':>8} {'MiB':>8} {'s/step':>8} {'fastest':>8} {'slowest':>8}")
    for length in args.length:
        for anchors in args.anchors:
            command = [sys.executable, "-m", "benchmarks.step", *sys.argv[1:], "--one", str(anchors), str(length)]
            row = answer(command)
            rows.append(row)
            print(
                f"{anchors:>8} {length:>8} {row['mib']:>8.0f} {row['seconds']:>8.3f} {row['fastest']:>8.3f} "
                f"{row['slowest']:>8.3f}",
                flush=True,
            )
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} threads"
    settings = {k: v for k, v in vars(args).items() if k not in ("one", "anchors", "length", "json")}
    finish({"benchmark": "step", "on": device, **settings, "rows": rows}, args.json)


if __name__ == "__main__":
    main()
