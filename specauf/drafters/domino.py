"""Domino (arXiv 2605.29707): DFlash drafts all slots at once, a small recurrent head then corrects them left to right.

    s[k] = GRU(E[x_0 .. x_{k-1}])            x_0 the anchor's token, E the target's embedding
    final[k] = base[k] + W2 SiLU(W1 [h[k] ; s[k]])       for slots behind `pure_draft_prefix_len`, base[k] before it

h and base are DFlash's. In training x are the data's tokens, in decoding those drafted so far.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from specauf.data.batch import BlockBatch
from specauf.drafters.base import Branch, Support, tokens_before
from specauf.drafters.config import DrafterConfig, DtypeName
from specauf.drafters.dflash import DFlashDrafter
from specauf.drafters.proposal import Choose, Proposal, left_to_right
from specauf.drafters.vocabulary import TargetVocabulary
from specauf.errors import UserError
from specauf.linear import Linear, linear

AufOn = Literal["base", "shared", "own"]


@dataclass(frozen=True)
class DominoConfig(DrafterConfig):
    """Shape of a Domino drafter: DFlash's, and its head's.

    Attributes:
        gru_hidden_dim: width of the recurrent state s.
        emb_dim: rank of the correction.
        pure_draft_prefix_len: drafted slots that keep their base logits; the paper's 1 leaves slot 1 alone, whose only
            earlier token, the anchor, the backbone sees itself.
    """

    kind: ClassVar[str] = "domino"
    architecture: ClassVar[str] = "DominoDraftModel"

    gru_hidden_dim: int = 1024
    emb_dim: int = 256
    pure_draft_prefix_len: int = 1

    def __post_init__(self) -> None:
        """Refuse shapes without a head."""
        super().__post_init__()
        for name in ("gru_hidden_dim", "emb_dim"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: {getattr(self, name)} found, at least 1 expected; correct drafter's config")
        if not 0 <= self.pure_draft_prefix_len < self.slots:
            raise UserError(
                f"pure_draft_prefix_len: {self.pure_draft_prefix_len} found, 0..{self.slots - 1} expected; "
                "with more no slot is corrected, train DRAFTER=dflash"
            )

    def to_zlab(self, dtype: DtypeName = "bfloat16") -> dict[str, Any]:
        """DFlash's `config.json` with the fields of SpecForge's Domino."""
        raw = super().to_zlab(dtype)
        raw["dflash_config"] |= {
            "projector_type": "domino",
            "gru_hidden_dim": self.gru_hidden_dim,
            "emb_dim": self.emb_dim,
            "pure_draft_prefix_len": self.pure_draft_prefix_len,
            "shift_label": False,
        }
        return raw

    @classmethod
    def from_zlab(cls, raw: dict[str, Any], **more: Any) -> "DrafterConfig":
        """Read the same.

        Raises:
            UserError: it is not a Domino drafter, or one whose slots predict the token behind them.
        """
        inner = raw.get("dflash_config") or {}
        if inner.get("shift_label", False):
            raise UserError(
                "shift_label: True in the drafter's config.json, False expected; its slots predict one token further"
            )
        for name in ("gru_hidden_dim", "emb_dim", "pure_draft_prefix_len"):
            if inner.get(name) is None:
                raise UserError(f"dflash_config.{name}: missing in the drafter's config.json; it is no Domino drafter")
            more[name] = inner[name]
        return super().from_zlab(raw, **more)


class CorrectionHead(nn.Module):
    """Rows [h ; s ; switch] to final logits; the switch is 0 where a slot keeps its base logits.

    Args:
        project: W1, SiLU, W2.
        vocabulary: the target's; with a reduced head only its rows of W2 are used.
    """

    def __init__(self, project: nn.Sequential, vocabulary: TargetVocabulary) -> None:
        super().__init__()
        self.project = project
        self.vocabulary = vocabulary
        up, down = project[0], project[2]
        assert isinstance(up, nn.Linear)
        assert isinstance(down, nn.Linear)
        self.up, ids = up, vocabulary.draft_ids
        # Taken once: each time its gradient would be one of all rows.
        self.down = down.weight if ids is None else down.weight[ids]

    def trained(self) -> list[Tensor]:
        """What `block_loss` gathers gradients of: W1, and the rows of W2 that are used."""
        return [self.up.weight, self.down]

    def forward(self, rows: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows draft_vocab"]:
        """Base logits and correction, each row on its own."""
        base = self.vocabulary.logits(rows[..., : self.vocabulary.hidden_size])
        return base + self.correction(rows).to(base.dtype)

    def correction(self, rows: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows draft_vocab"]:
        """What is added to the base logits."""
        inputs, switch = rows[..., :-1], rows[..., -1:]
        return linear(nn.functional.silu(self.up(inputs)) * switch, self.down)


class DominoDrafter(DFlashDrafter):
    """DFlash's layers with SpecForge's names for the head: `prefix_gru` and `embed_proj`.

    Args:
        config: its shape.
        activation_checkpointing: recompute layers in the backward pass.
        auf_on: which branch a loss that cuts at the first failure is put on; see `DominoSpec`.
        base_start: share of the base branch's loss at the start of training.
        base_ratio: share of the run after which the base branch's loss has gone, linearly.
    """

    name = "domino"
    config_class = DominoConfig
    config: DominoConfig

    def __init__(
        self,
        config: DrafterConfig,
        *,
        activation_checkpointing: bool = False,
        auf_on: AufOn = "base",
        base_start: float = 1.0,
        base_ratio: float = 1.0,
    ) -> None:
        assert isinstance(config, DominoConfig)
        super().__init__(config, activation_checkpointing=activation_checkpointing)
        self.auf_on, self.base_start, self.base_ratio = auf_on, base_start, base_ratio
        hidden, state = config.hidden_size, config.gru_hidden_dim
        self.prefix_gru = nn.GRU(hidden, state, batch_first=True, bias=False)
        down = Linear(config.emb_dim, config.vocab_size, bias=False)
        self.embed_proj = nn.Sequential(Linear(hidden + state, config.emb_dim, bias=False), nn.SiLU(), down)
        self.reset_parameters()
        # A fresh head corrects nothing, and tokens that training with `head_tokens` leaves out are never corrected:
        # random rows would push them up at random once the whole head decodes.
        nn.init.zeros_(down.weight)

    def base_share(self, progress: float) -> float:
        """The base branch's share of the loss, lambda: linear from `base_start` to 0 at `base_ratio` of the run."""
        return self.base_start * max(0.0, 1.0 - progress / self.base_ratio)

    def branches(self, batch: BlockBatch, vocabulary: TargetVocabulary, progress: float = 0.0) -> list[Branch]:
        """Base and final logits: loss = lambda base + (1 - lambda) final."""
        rows = self(batch, vocabulary)
        wide = self.widened(rows, self._states(tokens_before(batch, rows.shape[1]), vocabulary), first=0)
        share = self.base_share(progress)
        support: Support
        support = "whole" if self.auf_on == "base" else "base" if self.auf_on == "shared" else "own"
        return [
            Branch("base", rows, vocabulary.logits, share),
            Branch("final", wide, CorrectionHead(self.embed_proj, vocabulary), 1.0 - share, support),
        ]

    def widened(
        self, rows: Float[Tensor, "blocks some hidden"], states: Float[Tensor, "blocks some state"], first: int
    ) -> Float[Tensor, "blocks some width"]:
        """What `CorrectionHead` reads for slots first+1, first+2, ...: hidden state, recurrent state and switch."""
        slot = torch.arange(first, first + rows.shape[1], device=rows.device)
        switch = (slot >= self.config.pure_draft_prefix_len).to(rows.dtype)[None, :, None].expand(len(rows), -1, -1)
        return torch.cat([rows, states, switch], -1)

    def propose(
        self,
        rows: Float[Tensor, "prompts slots hidden"],
        anchor_tokens: Int[Tensor, " prompts"],
        vocabulary: TargetVocabulary,
        choose: Choose,
    ) -> Proposal:
        """Tokens slot by slot: each is corrected by those drafted before it."""
        head = CorrectionHead(self.embed_proj, vocabulary)
        base = vocabulary.logits(rows)  # of all slots at once: the head is read once, not slot by slot
        state = None

        def corrected(slot: int, before: Tensor) -> Tensor:
            nonlocal state
            out, state = self.prefix_gru(self._embedded(before[:, None], vocabulary), state)
            correction = head.correction(self.widened(rows[:, slot : slot + 1], out, slot))
            return (base[:, slot : slot + 1] + correction.to(base.dtype))[:, 0]

        return left_to_right(rows.shape[1], anchor_tokens, vocabulary, choose, corrected)

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
        seen = torch.cat([anchor_tokens[alive, None], labels[alive, :slot]], 1)
        state = self._states(seen, vocabulary)[:, -1:]
        head = CorrectionHead(self.embed_proj, vocabulary)
        logits = head(self.widened(rows[alive, slot : slot + 1], state, slot))[:, 0]
        return logits, logits.argmax(-1)

    def _states(
        self, tokens: Int[Tensor, "blocks some"], vocabulary: TargetVocabulary
    ) -> Float[Tensor, "blocks some state"]:
        rows = self._embedded(tokens, vocabulary)
        # Under bf16-mixed cuDNN's GRU would take fp16, whose range small gradients fall out of.
        with torch.autocast(rows.device.type, enabled=False):
            return self.prefix_gru(rows)[0]

    def _embedded(
        self, tokens: Int[Tensor, "blocks some"], vocabulary: TargetVocabulary
    ) -> Float[Tensor, "blocks some hidden"]:
        return vocabulary.embed(tokens).to(self.norm.weight.dtype)
