"""The target's leavings in a cache: embedding, LM head, config and tokenizer."""

import json
import tempfile
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float32
from safetensors.torch import load
from torch import Tensor

from specauf.cache.features import FeatureCodec
from specauf.cache.location import Location
from specauf.cache.objects import check_listing, read_checked
from specauf.cache.schema import CommitRecord
from specauf.errors import UserError

WEIGHTS, CONFIG, TOKENIZER = "weights.safetensors", "config.json", "tokenizer"

# Fields that make a target's embedding or logits more than `embed(ids)` and `lm_head(h)`; none of them is built here.
_UNKNOWN_SCALES = ("embedding_multiplier", "scale_emb", "logit_scale", "logits_scaling", "lm_head_multiplier")


class TargetFiles:
    """What training needs of the target, read from the cache alone; every file is checked before its first use.

    Args:
        place: the cache's `target` directory.
        record: its commit record.
        codec: how the cache stores features.
    """

    def __init__(self, place: Location, record: CommitRecord, codec: FeatureCodec) -> None:
        self.place, self.record, self.codec = place, record, codec
        check_listing(place, record)

    @cached_property
    def _weights(self) -> dict[str, Tensor]:
        weights: dict[str, Tensor] = load(read_checked(self.place, self.record, [WEIGHTS])[WEIGHTS])
        return weights

    @property
    def embed_tokens(self) -> Float[Tensor, "vocabulary hidden"]:
        """The input embedding."""
        return self._weights["embed_tokens"]

    @property
    def lm_head(self) -> Float[Tensor, "vocabulary hidden"]:
        """The output head; the same tensor as the embedding when the target ties them."""
        return self._weights.get("lm_head", self._weights["embed_tokens"])

    @property
    def tied(self) -> bool:
        """Whether embedding and head are one matrix."""
        return "lm_head" not in self._weights

    @cached_property
    def config(self) -> dict[str, Any]:
        """The target's Hugging Face config.json."""
        config: dict[str, Any] = json.loads(read_checked(self.place, self.record, [CONFIG])[CONFIG])
        return config

    @property
    def sketch_basis(self) -> Float32[np.ndarray, "features rank"] | None:
        """P, orthonormal columns; None without a sketch."""
        return self.codec.basis

    @property
    def sketch_scale(self) -> Float32[np.ndarray, " features"] | None:
        """S, one number per channel; None without a sketch."""
        return self.codec.channel_scale if self.codec.kind == "sketch" else None

    @cached_property
    def _copy(self) -> "tempfile.TemporaryDirectory[str]":
        copy: tempfile.TemporaryDirectory[str] = tempfile.TemporaryDirectory(prefix="specauf-tokenizer-")
        for name, data in self._tokenizer_files().items():
            path = Path(copy.name, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return copy

    def _tokenizer_files(self) -> dict[str, bytes]:
        return read_checked(self.place, self.record, [n for n in self.record.objects if n.startswith(f"{TOKENIZER}/")])

    @cached_property
    def tokenizer_directory(self) -> Path:
        """A local directory for `AutoTokenizer.from_pretrained`; of a remote cache a temporary copy."""
        if self.place.local is None:
            return Path(self._copy.name, TOKENIZER)
        self._tokenizer_files()
        return self.place.local / TOKENIZER


def refuse_unknown_scales(text: dict[str, Any]) -> None:
    """Refuse a target whose embedding or logits are scaled by more than the drafters here build.

    Args:
        text: the config of the target's language model, as a dict.

    Raises:
        UserError: naming the field.
    """
    for name in _UNKNOWN_SCALES:
        if text.get(name) not in (None, 1, 1.0):
            raise UserError(
                f"{name}: {text[name]} in the target's config scales its embedding or logits; not supported yet"
            )
