"""Targets of the building benchmarks: any that the builder takes, or one of an 8-billion model's sizes at random.

Time does not depend on weights, and a random target needs no download. Its documents are random tokens.
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.real_run import TARGETS
from cache_builder.features import fit_features
from cache_builder.stdlib_corpus import stdlib_prompts
from cache_builder.target import Target
from cache_builder.teacher import read_all
from cache_builder.writer import StorageSpec
from specauf.cache import FeatureCodec, Identity
from specauf.evaluation.run import encode
from specauf.targets import TargetConfig, load_target, resolve_target

RANDOM = "random-llama-3-8b"
HEAD_DIM = 128


def find_target(name: str, device: str, dtype: str | None) -> Target:
    """The target of this name, on a device.

    Args:
        name: as the builder takes it, or RANDOM.
        device: where it goes.
        dtype: instead of its own.
    """
    if name != RANDOM:
        config = resolve_target(name)
        config = replace(config, dtype=dtype or config.dtype)
        return Target(*load_target(config, device=device), config, k=32)
    shape = TARGETS["Llama-3-8B"]
    sizes = LlamaConfig(
        hidden_size=shape.hidden, num_hidden_layers=shape.layers, num_attention_heads=shape.query // HEAD_DIM,
        num_key_value_heads=shape.kv // HEAD_DIM, intermediate_size=shape.intermediate, vocab_size=shape.vocab,
        max_position_embeddings=8192, rope_theta=5e5, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(sizes, dtype=getattr(torch, dtype or "bfloat16"))
    model.eval().requires_grad_(False)
    model.generation_config.eos_token_id = None  # every answer has its full length
    return Target(model, SimpleNamespace(eos_token_id=None), TargetConfig(RANDOM, model=RANDOM), k=32)


def texts(target: Target, count: int, longest: int, *, chat: bool = False) -> list[np.ndarray]:
    """Tokens of some prompts of the standard library, or random ones of a quarter of the longest to the longest.

    Args:
        target: whose tokens.
        count: how many.
        longest: tokens at most, which are cut; chats are not.
        chat: in the target's chat template.
    """
    if target.name == RANDOM:
        draw = np.random.default_rng(0)
        return [draw.integers(0, target.vocab_size, int(n)) for n in draw.integers(longest // 4, longest + 1, count)]
    prompts = stdlib_prompts()[:count]
    if chat:
        return [encode(target.tokenizer, p)[0].numpy() for p in prompts]
    return [np.asarray(target.tokenizer(p)["input_ids"][:longest], dtype=np.int64) for p in prompts]


def prepare(
    target: Target, documents: list[tuple[np.ndarray, np.ndarray]], kind: str, batch_tokens: int
) -> StorageSpec:
    """How features are stored, fitted on the documents themselves; not timed, for a build does it once.

    A random target's sketch has a random basis, which takes as long to apply.
    """
    rank = target.hidden_size if kind == "sketch" else 0
    who = Identity(
        {"id": target.name}, "", "", target.vocab_size, target.hidden_size, target.num_layers, tuple(target.taps),
        target.k, None, 0, "float32", kind, rank, {}, {}, "0",  # type: ignore[arg-type]
    )  # fmt: skip
    taps = len(target.taps)
    if kind == "sketch" and target.name == RANDOM:
        width = taps * target.hidden_size
        basis = torch.linalg.qr(torch.randn(width, rank, device=target.device))[0].cpu().numpy()
        codec = FeatureCodec(kind, taps, np.ones(width, np.float32), basis)
    elif kind in ("int8", "sketch"):
        read = read_all(target, documents, batch_tokens=batch_tokens)
        features = [kept.float().cpu() for _, _, kept in read if kept is not None]
        codec = fit_features(torch.cat(features), kind, taps, rank)  # type: ignore[arg-type]
    else:
        codec = FeatureCodec(kind, taps)  # type: ignore[arg-type]
    return StorageSpec(who, codec, device=target.device)
