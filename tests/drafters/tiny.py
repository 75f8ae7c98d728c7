"""A tiny random target, drafters for it, and documents it wrote itself."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

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

VOCAB, MASK, BLOCK, TAPS = 61, 60, 6, (0, 2)
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    # Large enough that a random target has opinions, and its answers do not repeat at once.
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_SHAPE)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**_SHAPE)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_SHAPE, sliding_window=7)),
}


def tiny_target(family: str = "llama") -> Any:
    """A random causal LM of a family, fp32."""
    return FAMILIES[family]().eval().requires_grad_(False)


def tiny_config(target: Any, **changes: Any) -> DrafterConfig:
    settings = {"taps": TAPS, "mask_token_id": MASK, "block_size": BLOCK} | changes
    return DrafterConfig.from_target(target.config.to_dict(), **settings)


def tiny_dflash(target: Any, **changes: Any) -> DFlashDrafter:
    """A random drafter whose layers do something at once."""
    drafter = DFlashDrafter(tiny_config(target, **changes))
    for parameter in drafter.parameters():
        torch.nn.init.normal_(parameter, mean=0.0 if parameter.ndim > 1 else 1.0, std=0.2)
    return drafter.eval()


def tiny_drafter(kind: str, target: Any, **changes: Any) -> Drafter:
    """A random drafter of a kind, whose layers do something at once."""
    text = target.config.to_dict()
    settings: dict[str, Any] = {"taps": TAPS, "mask_token_id": MASK, "block_size": BLOCK}
    drafter: Drafter
    if kind == "dflash":
        drafter = DFlashDrafter(DrafterConfig.from_target(text, **settings | changes))
    elif kind == "dflash2":
        own = {"conv_group_size": 8, "selector_rank": 12, "selector_top_k": 5}
        drafter = DFlash2Drafter(DFlash2Config.from_target(text, **settings | own | changes))
    elif kind == "domino":
        head = {"gru_hidden_dim": 12, "emb_dim": 8}
        drafter = DominoDrafter(DominoConfig.from_target(text, **settings | head | changes))
    elif kind.startswith("dspark"):
        head = {"markov_rank": 8, "sample_from_anchor": kind == "dspark"}
        drafter = DSparkDrafter(DSparkConfig.from_target(text, **settings | head | changes))
    else:
        drafter = MaskedDrafter(MaskedConfig.from_target(text, **settings | {"taps": (), "feature_dim": 0} | changes))
    for parameter in drafter.parameters():
        torch.nn.init.normal_(parameter, mean=0.0 if parameter.ndim > 1 else 1.0, std=0.2)
    return drafter.eval()


def prompt(length: int, seed: int = 0) -> Int[Tensor, " tokens"]:
    return torch.randint(2, VOCAB - 1, (length,), generator=torch.Generator().manual_seed(seed))


def greedy_answer(target: Any, ids: Int[Tensor, " tokens"], new: int, **settings: Any) -> list[int]:
    """What transformers' own greedy generation says."""
    out = target.generate(
        ids[None], attention_mask=torch.ones_like(ids)[None], max_new_tokens=new, do_sample=False, **settings
    )
    return out[0, len(ids) :].tolist()


def features_of(
    target: Any, ids: Int[Tensor, " tokens"], taps: tuple[int, ...] = TAPS
) -> Float[Tensor, "tokens features"]:
    with torch.no_grad():
        hidden = target(ids[None], output_hidden_states=True).hidden_states
    return torch.cat([hidden[tap + 1][0] for tap in taps], -1)


@dataclass(frozen=True)
class TinyDocument:
    """What replay reads of a cache's document."""

    index: int
    tokens: Int[np.ndarray, " tokens"]
    loss_mask: Bool[np.ndarray, " tokens"]
    features: Float[np.ndarray, "tokens features"] | None
    sketch: Float[np.ndarray, "tokens rank"] | None = None


def document(
    target: Any,
    length: int,
    new: int,
    seed: int = 0,
    taps: tuple[int, ...] = TAPS,
    ids: Int[Tensor, " tokens"] | None = None,
) -> TinyDocument:
    """A prompt (random, of a length, when not given) with the target's greedy answer and features."""
    ids = prompt(length, seed) if ids is None else ids
    tokens = torch.cat([ids, torch.tensor(greedy_answer(target, ids, new))])
    return TinyDocument(
        seed, tokens.numpy(), np.arange(len(tokens)) >= len(ids), features_of(target, tokens, taps).numpy()
    )


def batch_of(documents: list[TinyDocument], anchors: list[list[int]], block_size: int = BLOCK) -> BlockBatch:
    """Documents packed end to end with blocks at the given positions of each."""
    offsets = torch.tensor([0, *np.cumsum([len(d.tokens) for d in documents])])
    tokens = torch.cat([torch.from_numpy(d.tokens) for d in documents])
    mask = torch.cat([torch.from_numpy(d.loss_mask) for d in documents])
    owner = torch.tensor([d for d, positions in enumerate(anchors) for _ in positions])
    flat = torch.tensor([p for positions in anchors for p in positions]) + offsets[owner]
    at = flat[:, None] + torch.arange(1, block_size)
    inside = at < offsets[owner + 1][:, None]
    at = torch.where(inside, at, 0)
    valid = inside & mask[at]
    features = (
        None if documents[0].features is None else torch.from_numpy(np.concatenate([d.features for d in documents]))
    )
    return BlockBatch(tokens, offsets, features, flat, owner, BlockTargets(torch.where(valid, tokens[at], 0), valid))


def vocabulary_of(target: Any) -> TargetVocabulary:
    return TargetVocabulary.from_target(target)


def five_blocks(kind: str, **changes: Any) -> tuple[Any, TargetVocabulary, BlockBatch, TinyDocument]:
    """A drafter with random weights, and blocks over one answer, the last of them hanging over its end."""
    target = tiny_target()
    d = document(target, 5, 24, 1)
    return tiny_drafter(kind, target, **changes), vocabulary_of(target), batch_of([d], [[5, 8, 14, 20, 25]]), d
