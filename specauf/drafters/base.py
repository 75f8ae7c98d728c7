"""What every drafter is to training, to decoding and to replay; subclasses say where their context comes from."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from specauf.data.batch import BlockBatch
from specauf.drafters.attention import Attend, AttentionKind, BlockLayout, SdpaAttend, training_attend
from specauf.drafters.blocks import BlockLayer, KeyValue, Rotation, initialise, rotation
from specauf.drafters.config import DrafterConfig
from specauf.drafters.memory import ContextMemory
from specauf.drafters.proposal import Choose, Proposal, greedy
from specauf.drafters.vocabulary import TargetVocabulary
from specauf.errors import UserError

Head = Callable[[Tensor], Tensor]
Support = Literal["own", "whole", "base", "final"]


@dataclass(frozen=True)
class Confidence:
    """How sure a drafter is of each slot, to be trained beside the tokens.

    Attributes:
        logits: of being accepted, given that all slots before are.
        weight: of its loss.
    """

    logits: Float[Tensor, "blocks slots"]
    weight: float


@dataclass(frozen=True)
class Branch:
    """One output of a drafter that a loss can be put on.

    Attributes:
        name: "base", or what the drafter calls it.
        rows: what `head` reads, for the drafted slots.
        head: rows -> logits, each row on its own.
        weight: share of this branch's loss in the total.
        support: slots that count under a loss that cuts at the first failure: this branch's "own" failure, the "whole"
            block, or those that it counts on the branch of this name, which has its "own".
        confidence: in what this branch says, where the drafter has one.
    """

    name: str
    rows: Float[Tensor, "blocks slots width"]
    head: Head
    weight: float
    support: Support = "own"
    confidence: Confidence | None = None


def tokens_before(batch: BlockBatch, slots: int) -> Int[Tensor, "blocks slots"]:
    """The data's token before each drafted slot, the anchor's before the first.

    A block that hangs over the end has no valid slot there: what is given for it does not matter.
    """
    steps = torch.arange(slots, device=batch.anchors.device)
    return batch.tokens[(batch.anchors[:, None] + steps).clamp(max=len(batch.tokens) - 1)]


def label_before(
    slot: int, alive: Int[Tensor, " alive"], anchor_tokens: Int[Tensor, " blocks"], labels: Int[Tensor, "blocks slots"]
) -> Int[Tensor, " alive"]:
    """The token before one slot of some blocks whose earlier slots all drafted the labels."""
    return labels[alive, slot - 1] if slot else anchor_tokens[alive]


class Drafter(nn.Module, ABC):
    """A block drafter: layers over the slots of a block, reading context rows as keys and values.

    Args:
        config: its shape.
        activation_checkpointing: recompute layers in the backward pass instead of keeping their activations.
    """

    name: ClassVar[str]
    config_class: ClassVar[type[DrafterConfig]] = DrafterConfig
    needs_features: ClassVar[bool]
    kinds: ClassVar[dict[str, "type[Drafter]"]] = {}  # by name; a class that gives itself a name is one

    def __init__(self, config: DrafterConfig, *, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        self.attention: AttentionKind = "auto"
        self.layers = nn.ModuleList(BlockLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" in vars(cls):
            Drafter.kinds[cls.name] = cls

    def reset_parameters(self) -> None:
        """Random weights, as Qwen3 starts."""
        initialise(self, self.config.initializer_range)

    def compile_rows(self) -> None:
        """Let torch.compile make one program, for any number of rows, of what works row by row in every layer.

        These are the projections with their norms and rotation, and the MLPs. Attention is left out: on CUDA it is a
        compiled kernel already (`specauf/drafters/flex.py`), elsewhere one product a document.
        """
        for layer in self._block_layers():
            layer.mlp.compile(dynamic=True, fullgraph=True)
            attention = layer.self_attn
            for name in ("project", "key_value"):
                setattr(attention, name, torch.compile(getattr(attention, name), dynamic=True, fullgraph=True))

    @abstractmethod
    def context_rows(
        self,
        tokens: Int[Tensor, " tokens"],
        positions: Int[Tensor, " tokens"],
        doc_offsets: Int[Tensor, " docs_plus_1"],
        features: Float[Tensor, "tokens features"] | None,
        vocabulary: TargetVocabulary,
    ) -> Float[Tensor, "tokens hidden"]:
        """The context row of each token of packed documents."""

    @abstractmethod
    def next_context_rows(
        self,
        memory: ContextMemory,
        tokens: Int[Tensor, "prompts rows"],
        positions: Int[Tensor, "prompts rows"],
        features: Float[Tensor, "prompts rows features"] | None,
        vocabulary: TargetVocabulary,
    ) -> Float[Tensor, "prompts rows hidden"]:
        """The same for tokens that follow those in memory."""

    def encode(self, batch: BlockBatch, vocabulary: TargetVocabulary) -> list[KeyValue]:
        """Keys and values of all tokens of packed documents, for every layer; all blocks read them."""
        lengths = batch.doc_offsets.diff()
        starts = torch.repeat_interleave(batch.doc_offsets[:-1], lengths, output_size=len(batch.tokens))
        positions = torch.arange(len(batch.tokens), device=starts.device) - starts
        features = None if batch.features is None else batch.features.to(self.norm.weight.dtype)
        rows = self.context_rows(batch.tokens, positions, batch.doc_offsets, features, vocabulary)
        by = self._rotation(positions)
        return [layer.self_attn.key_value(rows, by) for layer in self._block_layers()]

    def block_rows(
        self,
        anchor_tokens: Int[Tensor, " blocks"],
        positions: Int[Tensor, " blocks"],
        context: list[KeyValue],
        attend: Attend,
        vocabulary: TargetVocabulary,
        block_size: int | None = None,
    ) -> Float[Tensor, "blocks slots hidden"]:
        """Normed hidden states of the drafted slots of blocks at some anchors.

        Args:
            anchor_tokens: token at each anchor; it stands in slot 0, the mask token in the others.
            positions: position of each anchor in its own document.
            context: keys and values per layer, as `attend` expects them.
            attend: which context rows each block sees.
            vocabulary: embeds the tokens.
            block_size: drafted slots and one; the trained number when None.
        """
        rows = (block_size or self.config.block_size) - self.config.sample_from_anchor
        pairs = torch.stack([anchor_tokens, torch.full_like(anchor_tokens, self.config.mask_token_id)], 1)
        x = vocabulary.embed(pairs).to(self.norm.weight.dtype)
        by = self._rotation(positions[:, None] + torch.arange(rows, device=positions.device))
        last = None if self.config.sample_from_anchor else len(self.layers) - 1  # whose anchor slot nobody reads
        for number, (layer, key_value) in enumerate(zip(self._block_layers(), context, strict=True)):
            if self.activation_checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(layer, x, by, key_value, attend, number == 0, number == last, use_reentrant=False)
            else:
                x = layer(x, by, key_value, attend, number == 0, number == last)
        return self.norm(x)

    def forward(self, batch: BlockBatch, vocabulary: TargetVocabulary) -> Float[Tensor, "blocks slots hidden"]:
        """Normed hidden states of the drafted slots of every block; `vocabulary.logits` makes logits of them.

        Raises:
            UserError: the batch or the vocabulary is not of this drafter's target.
        """
        self.check(vocabulary, None if batch.features is None else batch.features.shape[1])
        starts = batch.doc_offsets[batch.anchor_doc]
        positions = batch.anchors - starts
        attend = training_attend(BlockLayout(starts, positions), self.attention)
        return self.block_rows(
            batch.tokens[batch.anchors], positions, self.encode(batch, vocabulary), attend, vocabulary
        )

    def branches(self, batch: BlockBatch, vocabulary: TargetVocabulary, progress: float = 0.0) -> list[Branch]:
        """What the loss is put on.

        Args:
            batch: blocks over packed documents.
            vocabulary: the target's, possibly with a reduced head.
            progress: share of the run behind us, for curricula.
        """
        return [Branch("base", self(batch, vocabulary), vocabulary.logits, 1.0)]

    def remember(
        self,
        memory: ContextMemory,
        tokens: Int[Tensor, "prompts rows"],
        features: Float[Tensor, "prompts rows features"] | None,
        counts: list[int],
        vocabulary: TargetVocabulary,
    ) -> None:
        """Add the rows of newly committed tokens to the context; of prompt p only the first `counts[p]` count.

        The anchor of the next block is not among them: its features are not known before it is verified.
        """
        steps = torch.arange(tokens.shape[1], device=tokens.device)
        positions = torch.tensor(memory.lengths, device=tokens.device)[:, None] + steps
        features = None if features is None else features.to(self.norm.weight.dtype)
        rows = self.next_context_rows(memory, tokens, positions, features, vocabulary)
        by = self._rotation(positions)
        for number, layer in enumerate(self._block_layers()):
            memory.append(number, *layer.self_attn.key_value(rows, by))
        memory.commit(counts)

    def draft(
        self,
        memory: ContextMemory,
        anchor_tokens: Int[Tensor, " prompts"],
        slots: int,
        vocabulary: TargetVocabulary,
        choose: Choose = greedy,
    ) -> Proposal:
        """Draft `slots` tokens behind the anchor of each prompt."""
        rows = self.next_block_rows(memory, anchor_tokens, slots, vocabulary)
        return self.propose(rows, anchor_tokens, vocabulary, choose)

    def next_block_rows(
        self, memory: ContextMemory, anchor_tokens: Int[Tensor, " prompts"], slots: int, vocabulary: TargetVocabulary
    ) -> Float[Tensor, "prompts slots hidden"]:
        """Normed hidden states of the drafted slots of the block behind each prompt's context."""
        lengths = torch.tensor(memory.lengths, device=anchor_tokens.device)
        starts = torch.arange(len(lengths), device=lengths.device) * memory.capacity
        context = [memory.packed(number) for number in range(len(self.layers))]
        on_host = ([number * memory.capacity for number in range(len(lengths))], memory.lengths)
        attend = SdpaAttend(BlockLayout(starts, lengths, on_host))
        return self.block_rows(anchor_tokens, lengths, context, attend, vocabulary, slots + 1)

    def propose(
        self,
        rows: Float[Tensor, "prompts slots hidden"],
        anchor_tokens: Int[Tensor, " prompts"],
        vocabulary: TargetVocabulary,
        choose: Choose,
    ) -> Proposal:
        """Tokens for drafted slots from their hidden states, each slot on its own."""
        columns, probs = choose(vocabulary.logits(rows))
        return Proposal(vocabulary.to_target(columns), None if probs is None else vocabulary.widen(probs))

    def accepted(
        self,
        rows: Float[Tensor, "blocks slots hidden"],
        anchor_tokens: Int[Tensor, " blocks"],
        labels: Int[Tensor, "blocks slots"],
        valid: Bool[Tensor, "blocks slots"],
        vocabulary: TargetVocabulary,
    ) -> Int[Tensor, " blocks"]:
        """How many drafted tokens in a row equal the labels, counted up to the first invalid slot.

        The head runs on slot 1 of all blocks, on slot 2 of those still alive, and so on.
        """
        count = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
        alive = valid[:, 0].nonzero()[:, 0]
        for slot in range(rows.shape[1]):
            if not len(alive):
                break
            _, drafted = self.slot_draft(rows, slot, alive, anchor_tokens, labels, vocabulary)
            right = vocabulary.to_target(drafted) == labels[alive, slot]
            count[alive] += right
            if slot + 1 < rows.shape[1]:
                alive = alive[right & valid[alive, slot + 1]]
        return count

    def slot_draft(
        self,
        rows: Float[Tensor, "blocks slots hidden"],
        slot: int,
        alive: Int[Tensor, " alive"],
        anchor_tokens: Int[Tensor, " blocks"],
        labels: Int[Tensor, "blocks slots"],
        vocabulary: TargetVocabulary,
    ) -> tuple[Float[Tensor, "alive draft_vocab"], Int[Tensor, " alive"]]:
        """Logits of one slot of some blocks as the loss sees them, and the column that is drafted greedily.

        All earlier slots are taken to have drafted the labels.
        """
        logits = vocabulary.logits(rows[alive, slot])
        return logits, logits.argmax(-1)

    def slot_confidence(
        self,
        rows: Float[Tensor, "blocks slots hidden"],
        slot: int,
        alive: Int[Tensor, " alive"],
        anchor_tokens: Int[Tensor, " blocks"],
        labels: Int[Tensor, "blocks slots"],
    ) -> Float[Tensor, " alive"] | None:
        """How likely the drafter itself says this slot of some blocks is accepted; None where it was not taught to say.

        All earlier slots are taken to have drafted the labels.
        """
        return None

    def check(self, vocabulary: TargetVocabulary, feature_dim: int | None) -> None:
        """Refuse another target's vocabulary or features.

        Raises:
            UserError: naming the first field that differs, with both values.
        """
        wanted: dict[str, tuple[Any, Any]] = {
            "hidden_size": (vocabulary.hidden_size, self.config.hidden_size),
            "vocab_size": (vocabulary.vocab_size, self.config.vocab_size),
        }
        if self.needs_features:
            wanted["features"] = (feature_dim, self.config.feature_dim)
        for field, (found, expected) in wanted.items():
            if found != expected:
                raise UserError(
                    f"{field}: {found} given, {expected} expected by the drafter; it belongs to another target or cache"
                )

    def _block_layers(self) -> list[BlockLayer]:
        return [layer for layer in self.layers if isinstance(layer, BlockLayer)]

    def _rotation(self, positions: Int[Tensor, "*rows"]) -> Rotation:
        return rotation(positions, self.config.head_dim, self.config.rope_theta, self.norm.weight.dtype)
