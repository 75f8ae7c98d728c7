"""A tiny random target with a real tokenizer, made in a second, for every builder test."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cache_builder.driver import build
from cache_builder.repair import repair
from specauf.cache.location import Location, sha256
from specauf.errors import UserError

SPECIAL = [
    "<|end|>", "<|start|>", "<|mask|>", "<|pad|>", "<s>", "</s>", "[INST]", "[/INST]",
    "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>",
]  # fmt: skip
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LAYERS, HIDDEN = 8, 32


def make_tokenizer(template: str = CHATML, eos: str = "<|im_end|>", bos: str | None = None) -> Any:
    """A byte-level tokenizer: 256 bytes and a few special tokens, so that any text round-trips."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=eos, bos_token=bos, pad_token="<|pad|>", chat_template=template
    )


def make_target(seed: int = 0, layers: int = LAYERS, **changes: Any) -> Any:
    """A random Llama over that tokenizer; the end token is likely enough for answers of uneven length."""
    torch.manual_seed(seed)
    vocab = 256 + len(SPECIAL)
    config = LlamaConfig(
        **{
            "vocab_size": vocab,
            "hidden_size": HIDDEN,
            "intermediate_size": 64,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "initializer_range": 0.3,
            "bos_token_id": None,
            "eos_token_id": 256 + SPECIAL.index("<|im_end|>"),
            "tie_word_embeddings": False,
        }
        | changes
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    return model


@pytest.fixture
def tiny_target_dir(tmp_path: Path) -> Path:
    """The tiny target and its tokenizer in a local model directory."""
    folder = tmp_path / "tiny-target"
    make_target().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    """A JSON Lines file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def digests(cache: Path) -> dict[str, str]:
    """sha256 of every object of a cache by its name."""
    place = Location(str(cache))
    return {name: sha256(place.read(name)) for name in place.files()}


Make = Callable[..., Path]


@pytest.fixture
def make(tiny_target_dir: Path, corpus: Path, tmp_path: Path) -> Make:
    """Builds `cache`, of three shards of the module's `corpus`."""

    def made(**changes: Any) -> Path:
        from tests.builder.test_build import config

        settings: dict[str, Any] = {"documents_per_shard": 8, "features": "sketch", "sketch_rank": 8}
        build(config(tiny_target_dir, corpus, tmp_path / "cache", **settings | changes))
        return tmp_path / "cache"

    return made


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refuse_to_repair(cache: Path, says: str) -> None:
    before = tree(cache)
    with pytest.raises(UserError, match=says):
        repair(str(cache), "cpu")
    assert tree(cache) == before
