"""A drafter that starts as its target's last layers, for `--model.drafter.init_args.init=DIR`.

python -m studies.late_layers TARGET DIR [--layers 2] [--block-size 8]

Attention, MLPs and norms are copied; `fc`, which has no counterpart in the target, is random. DFlash norms queries and
keys, as Qwen3 does: where the target does not, the norms start with the root mean square that each channel would have
for inputs of independent channels.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specauf.drafters import DFlashDrafter, DrafterConfig
from specauf.errors import run_command
from specauf.targets import load_target, mask_token_id, resolve_target


def late_layers(target: Any, taps: tuple[int, ...], mask: int, layers: int, block_size: int) -> DFlashDrafter:
    """The drafter; its random weights come from torch's generator.

    Args:
        target: a Llama-like causal language model.
        taps: layers whose outputs feed `fc`.
        mask: id of the mask token.
        layers: how many of the last ones.
        block_size: slots of a block.
    """
    config = DrafterConfig.from_target(
        target.config.to_dict(), taps=taps, mask_token_id=mask, num_hidden_layers=layers, block_size=block_size
    )
    drafter = DFlashDrafter(config)
    for mine, theirs in zip(drafter.layers, target.model.layers[-layers:], strict=True):
        weights = dict(theirs.state_dict())
        for name in ("q", "k"):
            rows = weights[f"self_attn.{name}_proj.weight"] * weights["input_layernorm.weight"]
            weights.setdefault(f"self_attn.{name}_norm.weight", _channel_rms(rows, config.head_dim))
        mine.load_state_dict(weights)
    drafter.norm.load_state_dict(target.model.norm.state_dict())
    return drafter


def _channel_rms(rows: Tensor, head_dim: int) -> Tensor:
    return rows.square().sum(1).view(-1, head_dim).mean(0).sqrt()


def main() -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("target")
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--block-size", type=int, default=8)
    return run_command(lambda: _write(parser.parse_args()))


def _write(args: argparse.Namespace) -> None:
    about = resolve_target(args.target)
    target, tokenizer = load_target(about)
    torch.manual_seed(0)
    mask = mask_token_id(about, tokenizer, target.config.vocab_size)
    drafter = late_layers(target, tuple(about.taps or ()), mask, args.layers, args.block_size)
    drafter.save_pretrained(args.out, dtype=torch.float32)
    print(f"{args.layers} layers of {about.name}: {args.out}")


if __name__ == "__main__":
    sys.exit(main())
