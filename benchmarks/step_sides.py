"""Forms of `benchmarks.step_peer`, in a process of their own: seconds and peak memory of some training steps.

    python -m benchmarks.step_sides FORM... [--rounds 1] [options of benchmarks.step_peer]

Both sides start from the same drafter, embedding, tokens, features and anchors. The learning rate is 0, so that AdamW
does all of its work and every step is the same step. On CUDA memory is the allocator's peak, the peer has its fused
losses and FlexAttention, and the floating-point operations of our step are counted. Ends with one JSON line: the
figures of each form, one record a round.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import forget_peak, peak_bytes
from specauf import linear
from specauf.data.batch import BlockBatch, BlockTargets
from specauf.drafters import DFlashDrafter, DrafterConfig, TargetVocabulary
from specauf.export.speculators import speculators_config
from specauf.objectives import AcceptUntilFail, CrossEntropy, ExponentialDecay, Objective, block_loss

# Share of the slots whose label is the drafter's own guess.
HITS = {"auf_1": 0.0, "auf_3": 0.68, "auf_all": 1.0}
FORMS = {
    "decay": "ours, decay",
    "auf_1": "ours, AUF, new drafter",
    "auf_3": "ours, AUF, tau about 3",
    "auf_all": "ours, AUF, every slot right",
    "decay_mkl": "ours, decay, torch's linear",
    "decay_sdpa": "ours, decay, SDPA a document",
    "peer": "speculators, decay",
    "peer_given": "speculators, labels given",
}
SLOW = 10.0  # seconds of a step that compiles, of which one wants to hear
TAPS, LAYERS, GAMMA = (1, 7, 14, 20, 27), 30, 7.0
Step = Callable[[], Tensor]


def options() -> argparse.ArgumentParser:
    """The shapes, shared by both sides."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--blocks", type=int, default=128)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=2048, help="tokens of the packed documents")
    parser.add_argument("--document", type=int, default=256, help="tokens of a document")
    parser.add_argument("--vocab", type=int, default=49_152)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--intermediate", type=int, default=1536)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--chunk", type=int, default=32, help="blocks whose logits exist at the same time, ours")
    parser.add_argument("--peer-attention", choices=("sdpa", "eager", "simple_flex_attention"))
    parser.add_argument("--attention", choices=("auto", "sdpa", "flex"), default="auto", help="ours")
    parser.add_argument("--repeat", type=int, default=2, help="steps measured in each process")
    parser.add_argument("--warm-up", type=int, default=1, help="steps before them, which also compile")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    return parser


def problem(args: argparse.Namespace) -> tuple[DFlashDrafter, Tensor, BlockBatch]:
    """A random drafter, an embedding, and blocks whose slots are all valid, with random labels."""
    with torch.device(args.device):
        return _problem(args)


def _problem(args: argparse.Namespace) -> tuple[DFlashDrafter, Tensor, BlockBatch]:
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    target = {
        "hidden_size": args.hidden,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.kv_heads,
        "head_dim": args.hidden // args.heads,
        "intermediate_size": args.intermediate,
        "vocab_size": args.vocab,
        "rope_theta": 1e5,
    }
    shape = {"num_hidden_layers": args.layers, "block_size": args.block_size, "mask_token_id": 0}
    drafter = DFlashDrafter(DrafterConfig.from_target(target, taps=TAPS, **shape)).to(args.device, dtype).train()
    embedding = torch.randn(args.vocab, args.hidden, dtype=dtype) / args.hidden**0.5
    tokens = torch.randint(0, args.vocab, (args.length,))
    offsets = torch.tensor([*range(0, args.length, args.document), args.length])
    # The peer takes no anchor among the last tokens, and this is its order.
    anchors = torch.randperm(args.length - args.block_size)[: args.blocks].sort().values
    owner = torch.searchsorted(offsets, anchors, right=True) - 1
    labels = tokens[anchors[:, None] + torch.arange(1, args.block_size)]
    targets = BlockTargets(labels, torch.ones_like(labels, dtype=torch.bool))
    drafter.attention = args.attention
    features = torch.randn(args.length, drafter.config.feature_dim, dtype=dtype)
    return drafter, embedding, BlockBatch(tokens, offsets, features, anchors, owner, targets)


def ours(form: str, args: argparse.Namespace) -> tuple[Step, nn.Module]:
    """Our loss of one batch, and the drafter."""
    linear.AVAILABLE = linear.AVAILABLE and form != "decay_mkl"
    drafter, embedding, batch = problem(args)
    if form == "decay_sdpa":
        drafter.attention = "sdpa"
    vocabulary = TargetVocabulary(embedding)
    objective = Objective(AcceptUntilFail() if form in HITS else ExponentialDecay(GAMMA), CrossEntropy())
    if HITS.get(form):
        with torch.no_grad():
            guesses = torch.stack([vocabulary.logits(rows).argmax(-1) for rows in drafter(batch, vocabulary)])
        hit = torch.rand(guesses.shape, device=guesses.device) < HITS[form]
        valid = batch.targets.valid
        batch = batch.with_targets(BlockTargets(torch.where(hit, guesses, batch.targets.labels), valid))

    def loss() -> Tensor:
        rows = drafter(batch, vocabulary)
        out = block_loss(rows, vocabulary.logits, batch.targets, objective, chunk_blocks=args.chunk)
        return out.numerator / out.denominator

    return loss, drafter


class Given(nn.Module):
    """Stands for the peer's verifier head when its logits are known: nothing is computed."""

    def __init__(self, labels: Tensor, vocab: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.logits = nn.functional.one_hot(labels, vocab).to(dtype)[None]

    def forward(self, rows: Tensor) -> Tensor:
        """The logits, which do not depend on the rows."""
        return self.logits


def theirs(form: str, args: argparse.Namespace) -> tuple[Step, nn.Module]:
    """The peer's loss of the same batch, and its drafter with our weights."""
    from speculators.losses import resolve_loss_config
    from speculators.models.dflash import DFlashDraftModel, DFlashSpeculatorConfig

    drafter, embedding, batch = problem(args)
    shape = speculators_config(drafter.config, draft_vocab_size=args.vocab, verifier=None, architectures=[])
    config = DFlashSpeculatorConfig(**{key: value for key, value in shape.items() if key != "dtype"})
    cuda = args.device == "cuda"
    attention = args.peer_attention or ("simple_flex_attention" if cuda else "sdpa")
    config.transformer_layer_config._attn_implementation = attention
    with torch.device(args.device):
        peer = DFlashDraftModel(config).to(embedding.dtype).train()
    left = peer.load_state_dict(drafter.state_dict(), strict=False)
    assert not left.unexpected_keys, left
    for layer in (peer.embed_tokens, peer.lm_head, peer.verifier_lm_head):
        layer.weight.data = embedding
    peer.verifier_norm.weight.data.fill_(1.0)
    if form == "peer_given":
        slots = batch.anchors[:, None] + torch.arange(args.block_size, device=args.device)
        # It asks for the slots' logits where they are fewer than the tokens, else for those before every token.
        fewer = slots.numel() < args.length
        labels = batch.tokens[slots.flatten()] if fewer else batch.tokens.roll(-1)
        peer.verifier_lm_head = Given(labels, args.vocab, embedding.dtype)
    owner = torch.searchsorted(batch.doc_offsets, torch.arange(args.length, device=args.device), right=True) - 1
    mask = torch.ones(1, args.length, device=args.device)
    use_anchors(batch.anchors)
    last = torch.randn(1, args.length, args.hidden, device=args.device, dtype=embedding.dtype)
    losses = resolve_loss_config("ce", "fused" if cuda else "eager")

    def loss() -> Tensor:
        _, value, _ = peer(
            batch.features[None], batch.tokens[None], mask, last, owner[None], None, losses, GAMMA, args.blocks
        )  # fmt: skip
        # It divides by the number of slots, we by the sum of weights.
        weights = torch.exp(-torch.arange(args.block_size - 1) / GAMMA)
        return value / weights.mean()

    return loss, peer


def use_anchors(anchors: Tensor) -> None:
    """Give the peer our anchors instead of a random choice of its own."""
    import speculators.models.dflash.core as core

    core.select_anchors = lambda *_: (anchors, torch.ones_like(anchors, dtype=torch.bool))


def run(form: str, args: argparse.Namespace) -> dict[str, Any]:
    """Steps of one form in this process."""
    cuda = args.device == "cuda"
    loss, drafter = (theirs if form.startswith("peer") else ours)(form, args)
    optimizer = torch.optim.AdamW([p for p in drafter.parameters() if p.requires_grad], lr=0.0)
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    forget_peak()
    before, seconds, used = peak_bytes(args.device), [], []

    def step() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        return value

    for number in range(args.warm_up + args.repeat):
        wall, processor = time.perf_counter(), time.process_time()
        value = step()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - wall)
        if number < args.warm_up and seconds[-1] > SLOW:
            print(f"{FORMS[form]}: step {number + 1} took {seconds[-1]:.0f} s", file=sys.stderr, flush=True)
        used.append(time.process_time() - processor)
    gradient = torch.nn.utils.get_total_norm(p.grad for p in drafter.parameters() if p.grad is not None)
    found = {
        "seconds": statistics.median(seconds[args.warm_up :]),
        "processor_seconds": statistics.median(used[args.warm_up :]),
        "peak_mib": (peak_bytes(args.device) - before) / 2**20,
        "process_mib": peak_bytes(args.device) / 2**20,
        "loss": value.item(),
        "gradient_norm": gradient.item(),
    }
    if cuda and not form.startswith("peer"):
        # The counter sees no compiled FlexAttention: with SDPA the step does the same products.
        drafter.attention = "sdpa"
        # SDPA copies keys and values for each block: what was measured must not be lost over that.
        try:
            with FlopCounterMode(display=False) as counter:
                step()
            found["teraflop"] = counter.get_total_flops() / 1e12
        except torch.cuda.OutOfMemoryError:
            print(f"{form}: operations not counted, SDPA needs more memory than there is", file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[options()]
    )
    parser.add_argument("forms", nargs="+", choices=FORMS, metavar="FORM")
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {form: [] for form in args.forms}
    for number in range(args.rounds):
        for form in args.forms:
            row = run(form, args)
            found[form].append(row)
            print(
                f"{number + 1}/{args.rounds} {FORMS[form]}: {row['seconds']:.3f} s, {row['peak_mib']:,.0f} MiB",
                file=sys.stderr,
                flush=True,
            )
            gc.collect()
            if args.device == "cuda":
                torch.cuda.empty_cache()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
