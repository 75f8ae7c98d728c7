"""DFlash 2 (z-lab, inco.ai/blog/dflash2): DFlash with short convolutions along the block and a choice among candidates.

    conv(x)_t = sum_j (base[j] + dynamic_t[j]) x_(t-j)     around attention and MLP of every layer, j = 0, 1
    final[k](b) = U[k](b) + <A[a] * W h[k], B[b]>          for b among the most probable by U[k]; U[k](b) for others

U are the logits that DFlash would draft from, a is the token before slot k. In training a is the data's token, in
decoding the one just drafted, and only candidates are drafted.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from specauf.data.batch import BlockBatch
from specauf.drafters.base import Branch, Support, label_before, tokens_before
from specauf.drafters.config import DrafterConfig, DtypeName
from specauf.drafters.convolution import ConvLayer
from specauf.drafters.dflash import DFlashDrafter
from specauf.drafters.kind_of_config import OWN_FIELDS
from specauf.drafters.proposal import Choose, Proposal, left_to_right
from specauf.drafters.vocabulary import TargetVocabulary
from specauf.errors import UserError
from specauf.linear import Linear

CutAt = Literal["base", "final", "own"]


@dataclass(frozen=True)
class DFlash2Config(DrafterConfig):
    """Shape of a DFlash 2 drafter: DFlash's, and that of what it adds.

    Attributes:
        conv_kernel_size: slots that a convolution reads, its own included.
        conv_group_size: channels that share the dynamic part of a kernel.
        selector_rank: width of the codebooks A and B.
        selector_top_k: candidates a slot.
    """

    kind: ClassVar[str] = "dflash2"
    architecture: ClassVar[str] = "DFlash2DraftModel"
    own: ClassVar[tuple[str, ...]] = OWN_FIELDS["dflash2"]

    conv_kernel_size: int = 2
    conv_group_size: int = 16
    selector_rank: int = 256
    selector_top_k: int = 16

    def __post_init__(self) -> None:
        """Refuse shapes that no server loads."""
        super().__post_init__()
        most = {
            "conv_kernel_size": self.block_size,
            "conv_group_size": self.hidden_size,
            "selector_rank": 1 << 30,
            "selector_top_k": self.vocab_size,
        }
        for name, limit in most.items():
            if not 1 <= getattr(self, name) <= limit:
                expected = "at least 1" if name == "selector_rank" else f"1 to {limit}"
                raise UserError(f"{name}: {getattr(self, name)} found, {expected} expected; correct drafter's config")
        if self.hidden_size % self.conv_group_size:
            raise UserError(
                f"conv_group_size: {self.conv_group_size} does not divide hidden_size {self.hidden_size}; "
                "choose a divisor"
            )

    def to_zlab(self, dtype: DtypeName = "bfloat16") -> dict[str, Any]:
        """DFlash's `config.json` with the fields of DFlash 2."""
        raw = super().to_zlab(dtype)
        raw["dflash_config"] |= {name: getattr(self, name) for name in self.own}
        return raw

    @classmethod
    def from_zlab(cls, raw: dict[str, Any], **more: Any) -> "DrafterConfig":
        """Read the same.

        Raises:
            UserError: it is not a DFlash 2 drafter, or scales its logits.
        """
        inner = raw.get("dflash_config") or {}
        # It weighs U against what the selector adds, so other tokens would be drafted without it.
        factor = inner.get("output_multiplier", raw.get("output_multiplier"))
        if factor not in (None, 1):
            raise UserError(
                f"output_multiplier: {factor!r} in the drafter's config.json, 1 expected; this drafter is not supported"
            )
        for name in cls.own:
            value = inner.get(name, raw.get(name))
            if type(value) is not int:
                found = "missing" if value is None else f"{value!r}, no whole number,"
                raise UserError(
                    f"dflash_config.{name}: {found} in the drafter's config.json; it is no DFlash 2 drafter"
                )
            more[name] = value
        return super().from_zlab(raw, **more)


class CandidateSelector(nn.Module):
    """Codebooks A (of the token before) and B (of a candidate), and W, which turns a slot's hidden state into weights.

    Args:
        config: of the drafter.
    """

    def __init__(self, config: DFlash2Config) -> None:
        super().__init__()
        self.top_k = config.selector_top_k
        self.predecessor_codebook = nn.Parameter(torch.empty(config.vocab_size, config.selector_rank))
        self.successor_codebook = nn.Parameter(torch.empty(config.vocab_size, config.selector_rank))
        self.hidden_projection = Linear(config.hidden_size, config.selector_rank, bias=False)
        nn.init.normal_(self.hidden_projection.weight, std=config.initializer_range)
        nn.init.normal_(self.predecessor_codebook, std=config.initializer_range)
        # A fresh selector changes nothing, and tokens that training with `head_tokens` leaves out stay as they are.
        nn.init.zeros_(self.successor_codebook)

    def context(
        self, rows: Float[Tensor, "*rows hidden"], predecessors: Int[Tensor, "*rows"]
    ) -> Float[Tensor, "*rows rank"]:
        """A[a] * W h."""
        return nn.functional.embedding(predecessors, self.predecessor_codebook) * self.hidden_projection(rows)

    def scores(
        self, context: Float[Tensor, "*rows rank"], candidates: Int[Tensor, "*rows k"]
    ) -> Float[Tensor, "*rows k"]:
        """What is added to the logits of the candidates, which are target ids."""
        # B's gradient is of the rows that were read, not as large as the vocabulary for every few blocks.
        rows = nn.functional.embedding(candidates, self.successor_codebook, sparse=True)
        return torch.einsum("...r,...kr->...k", context, rows.to(context.dtype))


class SelectorHead(nn.Module):
    """Rows [h ; A[a] * W h] to final logits.

    Args:
        selector: the drafter's.
        vocabulary: the target's; with a reduced head candidates are of its tokens.
    """

    def __init__(self, selector: CandidateSelector, vocabulary: TargetVocabulary) -> None:
        super().__init__()
        self.selector, self.vocabulary = selector, vocabulary

    def trained(self) -> list[Tensor]:
        """What `block_loss` gathers gradients of: B."""
        return [self.selector.successor_codebook]

    def forward(self, rows: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows draft_vocab"]:
        """Logits with the candidates' scores added."""
        width = self.vocabulary.hidden_size
        logits = self.vocabulary.logits(rows[..., :width])
        return self.rescored(logits, self.candidates(logits), rows[..., width:])

    def candidates(self, logits: Float[Tensor, "*rows draft_vocab"]) -> Int[Tensor, "*rows k"]:
        """Columns of the most probable tokens."""
        return logits.detach().topk(min(self.selector.top_k, logits.shape[-1]), dim=-1, sorted=False).indices

    def rescored(
        self,
        logits: Float[Tensor, "*rows draft_vocab"],
        columns: Int[Tensor, "*rows k"],
        context: Float[Tensor, "*rows rank"],
    ) -> Float[Tensor, "*rows draft_vocab"]:
        """U with the candidates' scores added."""
        scores = self.selector.scores(context, self.vocabulary.to_target(columns))
        return logits.scatter_add(-1, columns, scores.to(logits.dtype))


def only(
    logits: Float[Tensor, "*rows draft_vocab"], columns: Int[Tensor, "*rows k"]
) -> Float[Tensor, "*rows draft_vocab"]:
    """Logits of some columns and minus infinity elsewhere: servers draft candidates alone."""
    return torch.full_like(logits, -torch.inf).scatter_(-1, columns, logits.gather(-1, columns))


class DFlash2Drafter(DFlashDrafter):
    """z-lab's drafter with its state-dict names: `attention_conv`, `mlp_conv` and `candidate_selector`.

    Args:
        config: its shape.
        activation_checkpointing: recompute layers in the backward pass.
        auf_on: where a loss that cuts at the first failure cuts; see `DFlash2Spec`.
        base_weight: of the loss on U; that on the final logits has weight 1.
    """

    name = "dflash2"
    config_class = DFlash2Config
    config: DFlash2Config

    def __init__(
        self,
        config: DrafterConfig,
        *,
        activation_checkpointing: bool = False,
        auf_on: CutAt = "base",
        base_weight: float = 1.0,
    ) -> None:
        assert isinstance(config, DFlash2Config)
        super().__init__(config, activation_checkpointing=activation_checkpointing)
        self.auf_on, self.base_weight = auf_on, base_weight
        kernel = config.conv_kernel_size, config.conv_group_size
        plain, self.layers = self.layers, nn.ModuleList(ConvLayer(config, *kernel) for _ in self.layers)
        for layer, same in zip(self.layers, plain, strict=True):  # a seed's weights are those of a DFlash drafter
            layer.load_state_dict(same.state_dict(), strict=False)
        self.candidate_selector = CandidateSelector(config)

    def branches(self, batch: BlockBatch, vocabulary: TargetVocabulary, progress: float = 0.0) -> list[Branch]:
        """The logits U and the final ones: loss = base_weight base + final."""
        rows = self(batch, vocabulary)
        context = self.candidate_selector.context(rows, tokens_before(batch, rows.shape[1]))
        wide = torch.cat([rows, context.to(rows.dtype)], -1)
        cuts: dict[CutAt, tuple[Support, Support]]
        cuts = {"base": ("own", "whole"), "final": ("final", "own"), "own": ("own", "own")}
        on_base, on_final = cuts[self.auf_on]
        return [
            Branch("base", rows, vocabulary.logits, self.base_weight, on_base),
            Branch("final", wide, SelectorHead(self.candidate_selector, vocabulary), 1.0, on_final),
        ]

    def propose(
        self,
        rows: Float[Tensor, "prompts slots hidden"],
        anchor_tokens: Int[Tensor, " prompts"],
        vocabulary: TargetVocabulary,
        choose: Choose,
    ) -> Proposal:
        """Tokens slot by slot: each is chosen among its candidates by the one before it."""
        head = SelectorHead(self.candidate_selector, vocabulary)
        logits = vocabulary.logits(rows)
        columns = head.candidates(logits)

        def final(slot: int, before: Tensor) -> Tensor:
            context = self.candidate_selector.context(rows[:, slot], before)
            return only(head.rescored(logits[:, slot], columns[:, slot], context), columns[:, slot])

        return left_to_right(rows.shape[1], anchor_tokens, vocabulary, choose, final)

    def slot_draft(
        self,
        rows: Float[Tensor, "blocks slots hidden"],
        slot: int,
        alive: Int[Tensor, " alive"],
        anchor_tokens: Int[Tensor, " blocks"],
        labels: Int[Tensor, "blocks slots"],
        vocabulary: TargetVocabulary,
    ) -> tuple[Float[Tensor, "alive draft_vocab"], Int[Tensor, " alive"]]:
        """Final logits of one slot, given that all earlier slots drafted the labels, and the best candidate."""
        head = SelectorHead(self.candidate_selector, vocabulary)
        before = label_before(slot, alive, anchor_tokens, labels)
        logits = vocabulary.logits(rows[alive, slot])
        columns = head.candidates(logits)
        final = head.rescored(logits, columns, self.candidate_selector.context(rows[alive, slot], before))
        return final, only(final, columns).argmax(-1)
