"""What is known of a drafter's target without loading it: from a cache, or from a config.json."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from specauf.cache import Cache
from specauf.drafters import TargetVocabulary
from specauf.drafters.files import read_json
from specauf.drafters.vocabulary import target_scales
from specauf.errors import UserError


@dataclass(frozen=True)
class TargetFacts:
    """Numbers of the target that its drafter must agree with; None where they are not known.

    Attributes:
        where: where they were read, for messages.
        hidden_size: width.
        num_hidden_layers: depth.
        vocab_size: rows of the stored embedding.
        rope_theta: base of its rotary embedding.
        architectures: class names of its config; that of a GGUF file names none.
        model_type: its family.
        taps: layers that the cache's features come from.
        mask_token_id: the cache's mask token.
        vocabulary: embedding and head.
        embedding_scale: factor on embedded tokens.
        logit_softcap: cap on its logits.
    """

    where: str
    hidden_size: int
    num_hidden_layers: int
    vocab_size: int
    rope_theta: float | None
    architectures: tuple[str, ...] = ()
    model_type: str = ""
    taps: tuple[int, ...] | None = None
    mask_token_id: int | None = None
    vocabulary: TargetVocabulary | None = None
    embedding_scale: float = 1.0
    logit_softcap: float | None = None

    @classmethod
    def from_cache(cls, cache: Cache, where: str, *, weights: bool = True) -> "TargetFacts":
        """Of a cache's target, with its embedding and head unless they are not wanted."""
        identity = cache.manifest.identity
        vocabulary = TargetVocabulary.from_cache(cache) if weights else None
        return cls.from_config(
            cache.target.config,
            where,
            vocab_size=identity.vocab_size,
            taps=identity.taps if identity.features != "none" else None,
            mask_token_id=identity.mask_token_id,
            vocabulary=vocabulary,
        )

    @classmethod
    def from_file(cls, path: Path) -> "TargetFacts":
        """Of a target's directory or config.json.

        Raises:
            UserError: there is none, or a number is missing in it.
        """
        return cls.from_config(read_json(path / "config.json" if path.is_dir() else path), str(path))

    @classmethod
    def from_config(
        cls,
        config: dict[str, Any],
        where: str,
        *,
        vocab_size: int | None = None,
        taps: tuple[int, ...] | None = None,
        mask_token_id: int | None = None,
        vocabulary: TargetVocabulary | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> "TargetFacts":
        """Of a target's config as a dict, with what else is known of it; `dtype` is that of an embedding not given.

        Raises:
            UserError: a number is missing in it.
        """
        text = config.get("text_config") or config
        for name in ("hidden_size", "num_hidden_layers", "vocab_size"):
            if not isinstance(text.get(name), int):
                raise UserError(f"{name}: {text.get(name)!r} in the target's config ({where}), a number expected")
        rope = text.get("rope_parameters") or {}
        theta = rope.get("full_attention", rope).get("rope_theta", text.get("rope_theta"))
        scale, softcap = target_scales(text, dtype if vocabulary is None else vocabulary.embedding.dtype)
        return cls(
            where=where,
            hidden_size=text["hidden_size"],
            num_hidden_layers=text["num_hidden_layers"],
            vocab_size=text["vocab_size"] if vocab_size is None else vocab_size,
            rope_theta=None if theta is None else float(theta),
            architectures=tuple(config.get("architectures") or ()),
            model_type=str(text.get("model_type", "")),
            taps=None if taps is None else tuple(taps),
            mask_token_id=mask_token_id,
            vocabulary=vocabulary,
            embedding_scale=scale,
            logit_softcap=softcap,
        )
