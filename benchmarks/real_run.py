"""What a real run takes, calculated and not measured: bytes, hours and cost for an 8-billion target on 8 GPUs.

    python -m benchmarks.real_run [--samples 1300000] [--supervised 0.75] [--mfu 0.4] ...

Bytes come from the cache's layout and the measured 65.1 bytes of top-k a supervised token. Hours are arithmetic divided
by an assumed share of the GPU's peak; nothing here was run on a GPU. Prints the tables of docs/a-real-run.md.
"""

import argparse
from dataclasses import dataclass
from math import log2

from benchmarks.cache_size import TAPS, rivals
from benchmarks.common import finish

# DeepSpec's own figures: about 38 TB for 1.3 million samples of Qwen3-4B, hidden size 2,560.
DEEPSPEC_BYTES, DEEPSPEC_SAMPLES, DEEPSPEC_HIDDEN = 38e12, 1.3e6, 2560
TOPK_BYTES, TOPK_VOCAB, K = 65.1, 49_152, 32  # measured: docs/cache-format.md
MASKS = 5  # bytes of a token's id and loss mask


@dataclass(frozen=True)
class Target:
    """The shapes that count.

    Attributes:
        layers: decoder layers.
        hidden: width.
        query: width of queries.
        kv: width of keys, and of values.
        intermediate: width of the MLP.
        vocab: rows of the head.
    """

    layers: int
    hidden: int
    query: int
    kv: int
    intermediate: int
    vocab: int

    @property
    def layer(self) -> int:
        """Weights of a layer's matrices."""
        return 2 * self.hidden * self.query + 2 * self.hidden * self.kv + 3 * self.hidden * self.intermediate

    @property
    def head(self) -> int:
        """Weights of the LM head."""
        return self.vocab * self.hidden


TARGETS = {
    "Llama-3-8B": Target(32, 4096, 4096, 1024, 14_336, 128_256),
    "Qwen3-8B": Target(36, 4096, 4096, 1024, 12_288, 151_936),
    "Qwen3-4B": Target(36, 2560, 4096, 1024, 9728, 151_936),
}


def sample_tokens() -> float:
    """Mean tokens of a sample, as DeepSpec's size implies."""
    return DEEPSPEC_BYTES / DEEPSPEC_SAMPLES / rivals(DEEPSPEC_HIDDEN)["DeepSpec"]


def token_bytes(target: Target, supervised: float) -> dict[str, float]:
    """Bytes a token in our layouts and in those of others.

    Args:
        target: its shapes.
        supervised: share of the tokens that are supervised, which alone have top-k rows.
    """
    # A larger vocabulary makes each of K ids longer by its logarithm.
    rows = (TOPK_BYTES + K * log2(target.vocab / TOPK_VOCAB) / 8) * supervised + MASKS
    ours = {"sketch": target.hidden + 4 + rows, "int8": TAPS * (target.hidden + 4) + rows}
    return {**ours, **{name: float(size) for name, size in rivals(target.hidden).items()}}


def build_flops(target: Target, tokens: float, supervised: float) -> float:
    """Arithmetic of the target's one pass over a sample: body, attention, head on supervised rows."""
    attention = 4 * target.query * tokens / 2  # causal: half of the pairs
    return tokens * target.layers * (2 * target.layer + attention) + 2 * tokens * supervised * target.head


def train_flops(
    target: Target, tokens: float, *, anchors: int, block: int, layers: int, head_rows: float
) -> dict[str, float]:
    """Arithmetic of one sample's training step, forward and backward.

    Args:
        target: its shapes; the drafter's layers have them too.
        tokens: of the sample, which the drafter's context holds.
        anchors: blocks.
        block: slots of a block.
        layers: of the drafter.
        head_rows: slots of a block that reach the LM head: block - 1 for decay, about tau for AUF.

    Returns:
        Of the `body` and of the `head`, whose weights are frozen and so need no gradient.
    """
    slots = anchors * block
    matrices = slots * layers * target.layer
    # Context rows pass fc on the sketch, and each layer's keys and values; they have no MLP.
    context = tokens * (target.hidden**2 + layers * 2 * target.hidden * target.kv)
    attention = slots * layers * 2 * target.query * (tokens / 2 + block)
    return {"body": 6 * (matrices + context + attention), "head": 4 * anchors * head_rows * target.head}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=float, default=DEEPSPEC_SAMPLES)
    parser.add_argument("--tokens", type=float, default=sample_tokens(), help="mean tokens of a sample")
    parser.add_argument("--supervised", type=float, default=0.75, help="share of tokens that are supervised")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--peak", type=float, default=989e12, help="of a GPU, bf16; the default is an H100 SXM's")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the peak that is reached")
    parser.add_argument("--generate", type=float, default=5000, help="tokens a second and GPU when answers are written")
    parser.add_argument("--anchors", type=int, default=128, help="blocks of a sample in each epoch")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--layers", type=int, default=5, help="of the drafter")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--tau", type=float, default=4.0, help="mean slots of a block that AUF looks at")
    parser.add_argument("--hour", type=float, default=2.5, help="dollars of a GPU-hour")
    parser.add_argument("--month", type=float, default=23.0, help="dollars of a terabyte-month in an object store")
    parser.add_argument("--json", help="also write the figures to this file")
    return parser.parse_args()


def work_out(target: Target, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Terabytes of each layout, and hours of each stage on all GPUs."""
    tokens = args.samples * args.tokens
    rate = args.gpus * args.peak * args.mfu * 3600
    shape = {"anchors": args.anchors, "block": args.block_size, "layers": args.layers}
    hours = {
        "regenerate": tokens * args.supervised / (args.gpus * args.generate * 3600),
        "build": args.samples * build_flops(target, args.tokens, args.supervised) / rate,
    }
    for loss, rows in {"decay": args.block_size - 1, "auf": args.tau}.items():
        step = train_flops(target, args.tokens, head_rows=rows, **shape)
        hours[f"train_{loss}"] = args.epochs * args.samples * sum(step.values()) / rate
    return {
        "terabytes": {k: tokens * v / 1e12 for k, v in token_bytes(target, args.supervised).items()},
        "hours": hours,
    }


def main() -> None:
    args = parse()
    found = {name: work_out(target, args) for name, target in TARGETS.items()}
    billions = args.samples * args.tokens / 1e9
    print(f"{args.samples:,.0f} samples x {args.tokens:,.0f} tokens = {billions:.2f} billion tokens")
    layouts = list(next(iter(found.values()))["terabytes"])
    print("\n| target | " + " | ".join(f"{name}, TB" for name in layouts) + " |\n|---" + "|---" * len(layouts) + "|")
    for name, each in found.items():
        print(f"| {name} | " + " | ".join(f"{size:.1f}" for size in each["terabytes"].values()) + " |")
    stages = list(next(iter(found.values()))["hours"])
    print("\n| target | " + " | ".join(stages) + " |\n|---" + "|---" * len(stages) + "|")
    for name, each in found.items():
        cells = (f"{h:.1f} h, ${h * args.gpus * args.hour:,.0f}" for h in each["hours"].values())
        print(f"| {name} | " + " | ".join(cells) + " |")
    for name, each in found.items():
        sizes, hours = each["terabytes"], each["hours"]
        epoch = hours["train_auf"] / args.epochs * 3600
        rates = {k: sizes[k] * 1e3 / epoch for k in ("sketch", "DeepSpec")}
        print(
            f"\n{name}: a month of storage ${sizes['sketch'] * args.month:,.0f} (sketch), "
            f"${sizes['DeepSpec'] * args.month:,.0f} (DeepSpec's layout); an AUF epoch reads "
            f"{rates['sketch']:.2f} GB/s (sketch), {rates['DeepSpec']:.2f} GB/s (DeepSpec's layout)"
        )
    print()
    finish(
        {"benchmark": "real_run", **{k: v for k, v in vars(args).items() if k != "json"}, "targets": found}, args.json
    )


if __name__ == "__main__":
    main()
