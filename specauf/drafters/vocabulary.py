"""The target's embedding and LM head, frozen, as the drafter uses them."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from specauf.cache import Cache
from specauf.errors import UserError
from specauf.linear import linear

# Families that multiply the embedding by sqrt(hidden_size) inside the model.
_SCALED_EMBEDDING = ("gemma", "recurrent_gemma", "paligemma", "t5gemma")


def target_scales(text: dict[str, Any], dtype: torch.dtype = torch.float32) -> tuple[float, float | None]:
    """Factor on a target's embedded tokens, and the cap of its logits (None without).

    Args:
        text: the config of its language model.
        dtype: of its embedding: Gemma casts the factor to it before it multiplies.
    """
    scaled = str(text.get("model_type", "")).startswith(_SCALED_EMBEDDING)
    scale = torch.tensor(text["hidden_size"] ** 0.5, dtype=dtype).item() if scaled else 1.0
    return scale, text.get("final_logit_softcapping")


class TargetVocabulary(nn.Module):
    """Embedding and LM head of the target: never trained and never in a checkpoint (non-persistent buffers).

    A reduced draft vocabulary (`restrict`) keeps the embedding whole and cuts the head to some token ids; `logits` then
    has one column per kept token, in ascending order of ids.
    """

    embedding: Float[Tensor, "vocab hidden"]
    draft_ids: Int[Tensor, " draft_vocab"] | None
    draft_index: Int[Tensor, " vocab"] | None
    _head: Float[Tensor, "draft_vocab hidden"] | None

    def __init__(
        self,
        embedding: Float[Tensor, "vocab hidden"],
        head: Float[Tensor, "head_vocab hidden"] | None = None,
        *,
        embedding_scale: float = 1.0,
        logit_softcap: float | None = None,
        draft_ids: Int[Tensor, " draft_vocab"] | None = None,
    ) -> None:
        """Hold the target's tensors, without copying them.

        Args:
            embedding: the target's input embedding as stored.
            head: its LM head; the embedding when None (tied).
            embedding_scale: factor on embedded tokens (Gemma: sqrt(hidden)).
            logit_softcap: logits become `cap * tanh(logits / cap)` (Gemma 2).
            draft_ids: target ids of the head's rows, when the head is a reduced one; None when it is whole.
        """
        super().__init__()
        rows = embedding.shape[0] if draft_ids is None else draft_ids.shape[0]
        found = embedding if head is None else head
        if found.shape != (rows, embedding.shape[1]):
            raise UserError(
                f"lm_head: shape {tuple(found.shape)} found, {(rows, embedding.shape[1])} expected; "
                "embedding and head are not one target's"
            )
        self.embedding_scale = embedding_scale
        self.logit_softcap = logit_softcap
        self.register_buffer("embedding", embedding.detach(), persistent=False)
        # Tied weights stay one buffer, on whatever device the module moves to.
        own = None if head is None or head.data_ptr() == embedding.data_ptr() else head.detach()
        self.register_buffer("_head", own, persistent=False)
        index = None
        if draft_ids is not None:
            index = torch.full((embedding.shape[0],), -1, dtype=torch.int64, device=embedding.device)
            index[draft_ids] = torch.arange(rows, device=embedding.device)
        self.register_buffer("draft_ids", draft_ids, persistent=False)
        self.register_buffer("draft_index", index, persistent=False)

    @classmethod
    def from_config(
        cls,
        target_config: dict[str, Any],
        embedding: Float[Tensor, "vocab hidden"],
        head: Float[Tensor, "vocab hidden"] | None = None,
    ) -> "TargetVocabulary":
        """The vocabulary of a target known by its config: takes its embedding scale and logit soft cap from there."""
        text = target_config.get("text_config") or target_config
        scale, softcap = target_scales({"hidden_size": embedding.shape[1]} | text, embedding.dtype)
        return cls(embedding, head, embedding_scale=scale, logit_softcap=softcap)

    @classmethod
    def from_target(cls, target: Any) -> "TargetVocabulary":
        """The vocabulary of a loaded transformers causal LM, sharing its weights.

        Raises:
            UserError: its LM head has a bias, which the drafter's servers do not apply.
        """
        head = target.get_output_embeddings()
        if getattr(head, "bias", None) is not None:
            raise UserError(
                "lm_head.bias: found in the target, none expected; drafters for such targets are not supported"
            )
        return cls.from_config(target.config.to_dict(), target.get_input_embeddings().weight, head.weight)

    @classmethod
    def from_cache(cls, cache: Cache, dtype: torch.dtype = torch.float32) -> "TargetVocabulary":
        """The vocabulary of a cache's target, on the CPU."""
        target = cache.target
        embedding = target.embed_tokens.to(dtype)
        return cls.from_config(target.config, embedding, None if target.tied else target.lm_head.to(dtype))

    def hold_head_in(self, dtype: torch.dtype) -> None:
        """Keep the head in another type, in which `logits` are then computed; the embedding stays as it is."""
        self._head = self.head.to(dtype)

    @property
    def restricted(self) -> bool:
        """The head has some tokens only."""
        return self.draft_ids is not None

    @property
    def head(self) -> Float[Tensor, "draft_vocab hidden"]:
        """The LM head's weight (the embedding when they are tied)."""
        return self.embedding if self._head is None else self._head

    @property
    def vocab_size(self) -> int:
        """Rows of the stored embedding."""
        return self.embedding.shape[0]

    @property
    def hidden_size(self) -> int:
        """Width of the embedding."""
        return self.embedding.shape[1]

    @property
    def draft_vocab_size(self) -> int:
        """Columns of `logits`."""
        return self.head.shape[0]

    def embed(self, ids: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape hidden"]:
        """Embed tokens as the target does, its scale included."""
        rows = nn.functional.embedding(ids, self.embedding)
        return rows if self.embedding_scale == 1.0 else rows * self.embedding_scale

    def logits(self, hidden: Float[Tensor, "*shape hidden"]) -> Float[Tensor, "*shape draft_vocab"]:
        """Logits of normed hidden states through the frozen head, in the head's type."""
        logits = linear(hidden.to(self.head.dtype), self.head)
        return logits if self.logit_softcap is None else self.logit_softcap * torch.tanh(logits / self.logit_softcap)

    def restrict(self, token_ids: Int[Tensor, " draft_vocab"]) -> "TargetVocabulary":
        """The same target with a head of some tokens only; ids are sorted, as servers' offset tables need.

        Raises:
            UserError: an id is not in the vocabulary, or occurs twice, or the head is already reduced.
        """
        if self.draft_ids is not None:
            raise UserError("draft vocabulary: the head is already reduced; restrict the whole one")
        ids = torch.unique(token_ids.to(self.embedding.device))
        if len(ids) != len(token_ids) or (len(ids) and not 0 <= int(ids[0]) <= int(ids[-1]) < self.vocab_size):
            raise UserError(
                f"draft vocabulary: {len(token_ids)} ids given, different ones in 0..{self.vocab_size - 1} expected"
            )
        return TargetVocabulary(
            self.embedding,
            self.head[ids],
            embedding_scale=self.embedding_scale,
            logit_softcap=self.logit_softcap,
            draft_ids=ids,
        )

    def to_draft(self, ids: Int[Tensor, "*shape"]) -> tuple[Int[Tensor, "*shape"], Bool[Tensor, "*shape"]]:
        """Columns of `logits` for target ids, and whether the head has them (0 where it has not)."""
        if self.draft_index is None:
            return ids, torch.ones_like(ids, dtype=torch.bool)
        index = self.draft_index[ids]
        return index.clamp(min=0), index >= 0

    def to_target(self, draft_ids: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """Target ids of columns of `logits`."""
        return draft_ids if self.draft_ids is None else self.draft_ids[draft_ids]

    def widen(self, probs: Float[Tensor, "*shape draft_vocab"]) -> Float[Tensor, "*shape vocab"]:
        """Probabilities over the target's vocabulary from those over the head's: zero where the head has no column."""
        if self.draft_ids is None:
            return probs
        wide = probs.new_zeros(*probs.shape[:-1], self.vocab_size)
        wide[..., self.draft_ids] = probs
        return wide
