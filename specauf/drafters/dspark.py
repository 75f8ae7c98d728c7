"""DSpark (arXiv 2607.05147): DFlash drafts all slots at once, a Markov head then biases each by the token before it.

    final[k] = base[k] + W2 u[k]            u[k] from the token before slot k and from h[k], see `markov.py`
    c[k] = sigmoid(w [h[k] ; W1[x[k-1]]] + b)          how likely slot k is accepted, if all before it are

h and base are DFlash's, except that h[k] is by default the hidden state of slot k-1 ("sample_from_anchor": true, as
published): the anchor's slot predicts too, and B-1 rows draft B-1 tokens. With false, h[k] is that of slot k itself, as
in DFlash. In training x are the data's tokens, in decoding those drafted so far.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from specauf.data.batch import BlockBatch
from specauf.drafters.base import Branch, Confidence, label_before, tokens_before
from specauf.drafters.config import DrafterConfig, DtypeName
from specauf.drafters.dflash import DFlashDrafter
from specauf.drafters.kind_of_config import OWN_FIELDS
from specauf.drafters.markov import MARKOV_HEADS, BiasedHead, MarkovHead
from specauf.drafters.proposal import Choose, Proposal, left_to_right
from specauf.drafters.vocabulary import TargetVocabulary
from specauf.errors import UserError
from specauf.linear import Linear


@dataclass(frozen=True)
class DSparkConfig(DrafterConfig):
    """Shape of a DSpark drafter: DFlash's, and that of its heads.

    Attributes:
        markov_rank: width of the Markov head.
        markov_head_type: vanilla (the token before alone), gated (by the slot's hidden state), rnn (all tokens before).
        enable_confidence_head: the drafter says how sure it is of each slot.
        sample_from_anchor: a row predicts the token behind it, and not its own. `block_size` is B here all the same,
            the anchor and what is drafted; servers' configs then say B-1.
    """

    kind: ClassVar[str] = "dspark"
    architecture: ClassVar[str] = "DSparkDraftModel"
    own: ClassVar[tuple[str, ...]] = OWN_FIELDS["dspark"]

    markov_rank: int = 256
    markov_head_type: str = "vanilla"
    enable_confidence_head: bool = True
    sample_from_anchor: bool = True

    def __post_init__(self) -> None:
        """Refuse shapes without a head."""
        super().__post_init__()
        if self.markov_rank < 1:
            raise UserError(
                f"markov_rank: {self.markov_rank} found, at least 1 expected; without a head train DRAFTER=dflash"
            )
        if self.markov_head_type not in MARKOV_HEADS:
            raise UserError(f"markov_head_type: {self.markov_head_type!r} found, {' or '.join(MARKOV_HEADS)} expected")

    @property
    def confidence_head_with_markov(self) -> bool:
        """The confidence reads the token before, too."""
        return self.enable_confidence_head

    def to_zlab(self, dtype: DtypeName = "bfloat16") -> dict[str, Any]:
        """DFlash's `config.json` with the fields of DSpark, in the two places where servers look for them."""
        raw = super().to_zlab(dtype)
        own = {name: getattr(self, name) for name in self.own}
        rows = self.block_size - self.sample_from_anchor
        raw["dflash_config"] |= {"projector_type": self.kind, "block_size": rows, **own}
        if self.num_key_value_heads == self.num_attention_heads:
            raw["dflash_config"]["attention_mode"] = "mha"  # SpecForge wants it said
        return raw | own | {"block_size": rows, "sample_from_anchor": self.sample_from_anchor}

    @classmethod
    def from_zlab(cls, raw: dict[str, Any], **more: Any) -> "DrafterConfig":
        """Read the same.

        Raises:
            UserError: it is not a DSpark drafter, or one whose confidence reads less than ours.
        """
        inner = raw.get("dflash_config") or {}
        from_anchor = raw.get("sample_from_anchor", True)  # as all servers read it
        if type(from_anchor) is not bool:
            raise UserError(f"sample_from_anchor: {from_anchor!r} in the drafter's config.json, true or false expected")
        # What other trainers leave out is what servers take.
        defaults: dict[str, Any] = {"markov_rank": None, "markov_head_type": "vanilla"}
        defaults |= {"enable_confidence_head": False, "confidence_head_with_markov": False}
        found = {name: inner.get(name, raw.get(name, default)) for name, default in defaults.items()}
        for name, kind in zip(cls.own, (int, str, bool, bool), strict=True):
            if type(found[name]) is not kind:
                said = "missing" if found[name] is None else f"{found[name]!r}, no {kind.__name__},"
                raise UserError(f"{name}: {said} in the drafter's config.json; it is no DSpark drafter")
        if found["enable_confidence_head"] and not found.pop("confidence_head_with_markov"):
            raise UserError(
                "confidence_head_with_markov: false in the drafter's config.json, true expected; this drafter is not "
                "supported"
            )
        found.pop("confidence_head_with_markov", None)
        more |= found | {"sample_from_anchor": from_anchor}
        raw = raw | {"sample_from_anchor": False}  # the rest of the config is DFlash's
        size = inner.get("block_size", raw.get("block_size"))
        if from_anchor and type(size) is int:
            raw |= {"block_size": size + 1, "dflash_config": inner | {"block_size": size + 1}}
        return super().from_zlab(raw, **more)


class ConfidenceHead(nn.Module):
    """Rows [h ; e] to the logit of being accepted.

    Args:
        config: the drafter's.
    """

    def __init__(self, config: DSparkConfig) -> None:
        super().__init__()
        self.proj = Linear(config.hidden_size + config.markov_rank, 1)
        nn.init.normal_(self.proj.weight, std=config.initializer_range)
        nn.init.zeros_(self.proj.bias)

    def forward(
        self, hidden: Float[Tensor, "*rows hidden"], embedded: Float[Tensor, "*rows rank"]
    ) -> Float[Tensor, "*rows"]:
        """One number for each row."""
        found: Tensor = self.proj(torch.cat([hidden, embedded], -1))[..., 0]
        return found


class DSparkDrafter(DFlashDrafter):
    """DFlash's layers with everyone's names for the heads: `markov_head` and `confidence_head`.

    Args:
        config: its shape.
        activation_checkpointing: recompute layers in the backward pass.
        confidence_weight: of the confidence's loss beside that of the tokens.
    """

    name = "dspark"
    config_class = DSparkConfig
    not_its_own = ("embed_tokens.weight", "lm_head.weight")  # DeepSpec stores them
    config: DSparkConfig

    def __init__(
        self, config: DrafterConfig, *, activation_checkpointing: bool = False, confidence_weight: float = 1.0
    ) -> None:
        assert isinstance(config, DSparkConfig)
        super().__init__(config, activation_checkpointing=activation_checkpointing)
        self.confidence_weight = confidence_weight
        sizes = config.vocab_size, config.hidden_size, config.markov_rank
        self.markov_head = MarkovHead(*sizes, config.markov_head_type, config.initializer_range)
        self.confidence_head = ConfidenceHead(config) if config.enable_confidence_head else None

    def branches(self, batch: BlockBatch, vocabulary: TargetVocabulary, progress: float = 0.0) -> list[Branch]:
        """The final logits, and the confidence in them."""
        rows = self(batch, vocabulary)
        embedded = self.markov_head.embed(tokens_before(batch, rows.shape[1])).to(rows.dtype)
        wide = torch.cat([rows, self.markov_head.latents(rows, embedded).to(rows.dtype)], -1)
        confidence = None
        if self.confidence_head is not None:
            confidence = Confidence(self.confidence_head(rows, embedded), self.confidence_weight)
        return [Branch("base", wide, BiasedHead(self.markov_head, vocabulary), 1.0, confidence=confidence)]

    def propose(
        self,
        rows: Float[Tensor, "prompts slots hidden"],
        anchor_tokens: Int[Tensor, " prompts"],
        vocabulary: TargetVocabulary,
        choose: Choose,
    ) -> Proposal:
        """Tokens slot by slot: each is biased by those drafted before it."""
        head = BiasedHead(self.markov_head, vocabulary)
        base = vocabulary.logits(rows)  # of all slots at once: the head is read once, not slot by slot
        state = None

        def biased(slot: int, before: Tensor) -> Tensor:
            nonlocal state
            latent, state = self.markov_head.step(rows[:, slot], self.markov_head.embed(before).to(rows.dtype), state)
            return base[:, slot] + head.bias(latent).to(base.dtype)

        return left_to_right(rows.shape[1], anchor_tokens, vocabulary, choose, biased)

    def slot_draft(
        self,
        rows: Float[Tensor, "blocks slots hidden"],
        slot: int,
        alive: Int[Tensor, " alive"],
        anchor_tokens: Int[Tensor, " blocks"],
        labels: Int[Tensor, "blocks slots"],
        vocabulary: TargetVocabulary,
    ) -> tuple[Float[Tensor, "alive draft_vocab"], Int[Tensor, " alive"]]:
        """Final logits of one slot, given that all earlier slots drafted the labels, and the best column."""
        first = 0 if self.markov_head.kind == "rnn" else slot  # the others look back at one token alone
        before = torch.cat([anchor_tokens[alive, None], labels[alive, :slot]], 1)[:, first:]
        hidden = rows[alive, first : slot + 1]
        latent = self.markov_head.latents(hidden, self.markov_head.embed(before).to(rows.dtype))[:, -1]
        logits = BiasedHead(self.markov_head, vocabulary)(torch.cat([hidden[:, -1], latent.to(rows.dtype)], -1))
        return logits, logits.argmax(-1)

    def slot_confidence(
        self,
        rows: Float[Tensor, "blocks slots hidden"],
        slot: int,
        alive: Int[Tensor, " alive"],
        anchor_tokens: Int[Tensor, " blocks"],
        labels: Int[Tensor, "blocks slots"],
    ) -> Float[Tensor, " alive"] | None:
        """What the confidence head says."""
        if self.confidence_head is None:
            return None
        before = label_before(slot, alive, anchor_tokens, labels)
        return self.confidence_head(rows[alive, slot], self.markov_head.embed(before).to(rows.dtype)).sigmoid()
