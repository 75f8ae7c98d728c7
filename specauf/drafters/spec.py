"""What a run's config says about its drafter; the rest comes from the cache's target."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Literal

from specauf.cache import Manifest
from specauf.cache.target import TargetFiles
from specauf.drafters.attention import AttentionKind
from specauf.drafters.base import Drafter
from specauf.drafters.dflash import DFlashDrafter
from specauf.drafters.dflash2 import CutAt, DFlash2Config, DFlash2Drafter
from specauf.drafters.domino import AufOn, DominoConfig, DominoDrafter
from specauf.drafters.dspark import DSparkConfig, DSparkDrafter
from specauf.drafters.kind_of_config import zlab_kind
from specauf.drafters.masked import MaskedConfig, MaskedDrafter
from specauf.drafters.warm_start import continue_from
from specauf.errors import UserError, unknown_name


def build_drafter(name: str, config: dict[str, Any]) -> Drafter:
    """An untrained drafter of a kind, from the dict that its `config.to_dict()` gave.

    Raises:
        UserError: there is no such kind.
    """
    if name not in Drafter.kinds:
        said = unknown_name("drafter", name, Drafter.kinds)
        raise UserError(f"{said}; one of your own must be imported by specauf/drafters/__init__.py")
    kind = Drafter.kinds[name]
    return kind(kind.config_class.from_dict(config))


def zlab_class(raw: dict[str, Any]) -> type[DFlashDrafter]:
    """The class of a z-lab style `config.json`; DFlash's where there is none of that name, which then refuses it."""
    kind = Drafter.kinds.get(zlab_kind(raw), DFlashDrafter)
    return kind if issubclass(kind, DFlashDrafter) else DFlashDrafter


def require_kind(spec: "DrafterSpec", drafter: Drafter) -> None:
    """Refuse a drafter that its checkpoints would not name: they would be read as another kind.

    Raises:
        UserError: the spec's name is not that of the drafter's class.
    """
    kind = Drafter.kinds.get(spec.name)
    if kind is not type(drafter):
        known = "no drafter" if kind is None else kind.__name__
        raise UserError(
            f"model.drafter: {type(spec).__name__} has the name {spec.name!r}, which is that of {known}, and makes a "
            f"{type(drafter).__name__}: give both classes a `name` of their own, the same"
        )


class DrafterSpec(ABC):
    """Choices for a drafter that do not depend on the target.

    Attributes:
        name: of the kind of drafter.
        block_size: slots of a block, the anchor's included.
        needs_features: it reads the target's features.
    """

    name: ClassVar[str]
    needs_features: ClassVar[bool]
    block_size: int

    @abstractmethod
    def build(self, manifest: Manifest, target: TargetFiles) -> Drafter:
        """The drafter for a cache's target, with fresh random weights or those of `init`.

        Raises:
            UserError: the cache lacks what this drafter needs, or `init` is another target's.
        """


class DFlashSpec(DrafterSpec):
    """A DFlash drafter for the cache's target.

    Args:
        num_hidden_layers: depth of the drafter.
        block_size: slots of a block, the anchor's included.
        num_attention_heads: the target's when null.
        num_key_value_heads: the target's when null.
        head_dim: the target's when null.
        intermediate_size: the target's when null.
        rope_theta: the target's when null.
        activation_checkpointing: recompute layers in the backward pass, to save memory.
        attention: in training: flex (FlexAttention, compiled once a process), sdpa (one call a document), or auto,
            which is flex on CUDA and sdpa elsewhere. Few documents a step need no flex.
        init: a run, a checkpoint, a z-lab or a speculators directory to start from instead of random weights; it
            decides the shape, except for block size, taps and mask token, which must agree.
    """

    name = "dflash"
    needs_features = True

    def __init__(
        self,
        num_hidden_layers: int = 2,
        block_size: int = 16,
        num_attention_heads: int | None = None,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        intermediate_size: int | None = None,
        rope_theta: float | None = None,
        activation_checkpointing: bool = False,
        attention: AttentionKind = "auto",
        init: Path | None = None,
    ) -> None:
        self.block_size = block_size
        self.activation_checkpointing = activation_checkpointing
        self.attention: AttentionKind = attention
        self.init = init
        self.sizes: dict[str, Any] = {
            "num_hidden_layers": num_hidden_layers,
            "num_attention_heads": num_attention_heads,
            "num_key_value_heads": num_key_value_heads,
            "head_dim": head_dim,
            "intermediate_size": intermediate_size,
            "rope_theta": rope_theta,
        }

    def build(self, manifest: Manifest, target: TargetFiles) -> Drafter:
        """The drafter for a cache's target.

        Raises:
            UserError: the cache has no features, or `init` is another target's.
        """
        drafter = self._fresh(manifest, target)
        if self.init is not None:
            drafter = continue_from(self.init, drafter, target).train()
        drafter.attention = self.attention
        drafter.activation_checkpointing = self.activation_checkpointing
        return drafter

    def _fresh(self, manifest: Manifest, target: TargetFiles) -> Drafter:
        config = DFlashDrafter.config_class.from_target(target.config, **self._settings(manifest))
        return DFlashDrafter(config, activation_checkpointing=self.activation_checkpointing)

    def _settings(self, manifest: Manifest) -> dict[str, Any]:
        identity = manifest.identity
        if identity.features == "none":
            raise UserError(
                f"features: none in the cache, the {self.name} drafter needs them; train DRAFTER=masked, or rebuild "
                "the cache"
            )
        return self.sizes | {
            "block_size": self.block_size,
            "taps": identity.taps,
            "mask_token_id": identity.mask_token_id,
            "feature_dim": identity.sketch_rank if identity.features == "sketch" else None,
            "vocab_size": identity.vocab_size,
        }


class DominoSpec(DFlashSpec):
    """A Domino drafter for the cache's target; `init` may also be a DFlash drafter, its head then starts fresh.

    Args:
        gru_hidden_dim: width of the recurrent state.
        emb_dim: rank of the correction.
        pure_draft_prefix_len: drafted slots that are not corrected.
        auf_on: where a loss cuts at the first failure: base (the base branch alone, the final one over the whole
            block: the best in Spec-AUF's ablation), shared (both at the base branch's failure), own (each at its own).
        base_start: share of the base branch's loss at the start.
        base_ratio: share of the run after which it has gone, linearly.
        more: those of `DFlashSpec`.
    """

    name = "domino"

    def __init__(
        self,
        gru_hidden_dim: int = 1024,
        emb_dim: int = 256,
        pure_draft_prefix_len: int = 1,
        auf_on: AufOn = "base",
        base_start: float = 1.0,
        base_ratio: float = 1.0,
        **more: Any,
    ) -> None:
        super().__init__(**more)
        if not 0 <= base_start <= 1:
            raise UserError(f"base_start: {base_start} found, 0..1 expected: the base branch's share of the loss")
        if not 0 < base_ratio <= 1:
            raise UserError(f"base_ratio: {base_ratio} found, above 0 and at most 1 expected: a share of the run")
        self.head: dict[str, Any] = {
            "gru_hidden_dim": gru_hidden_dim,
            "emb_dim": emb_dim,
            "pure_draft_prefix_len": pure_draft_prefix_len,
        }
        self.auf_on, self.base_start, self.base_ratio = auf_on, base_start, base_ratio

    def _fresh(self, manifest: Manifest, target: TargetFiles) -> Drafter:
        config = DominoConfig.from_target(target.config, **self._settings(manifest), **self.head)
        return DominoDrafter(
            config,
            activation_checkpointing=self.activation_checkpointing,
            auf_on=self.auf_on,
            base_start=self.base_start,
            base_ratio=self.base_ratio,
        )


class DFlash2Spec(DFlashSpec):
    """A DFlash 2 drafter for the cache's target; `init` may also be a DFlash drafter, what is new then starts fresh.

    Args:
        conv_kernel_size: slots that a convolution reads, its own included.
        conv_group_size: channels that share the dynamic part of a kernel; a divisor of hidden_size.
        selector_rank: width of the selector's codebooks.
        selector_top_k: candidates a slot.
        auf_on: where a loss that cuts at the first failure cuts: base (the base loss alone, at its own failure; the
            final one over the whole block), final (both where the drafted tokens fail), own (each at its own failure).
        base_weight: of the loss on the logits before the choice; that on the final ones has weight 1.
        more: those of `DFlashSpec`.
    """

    name = "dflash2"

    def __init__(
        self,
        conv_kernel_size: int = 2,
        conv_group_size: int = 16,
        selector_rank: int = 256,
        selector_top_k: int = 16,
        auf_on: CutAt = "base",
        base_weight: float = 1.0,
        **more: Any,
    ) -> None:
        super().__init__(**more)
        if not 0 <= base_weight < float("inf"):
            raise UserError(f"base_weight: {base_weight} found, a finite number from 0 expected")
        self.own: dict[str, Any] = {
            "conv_kernel_size": conv_kernel_size,
            "conv_group_size": conv_group_size,
            "selector_rank": selector_rank,
            "selector_top_k": selector_top_k,
        }
        self.auf_on: CutAt = auf_on
        self.base_weight = base_weight

    def _fresh(self, manifest: Manifest, target: TargetFiles) -> Drafter:
        config = DFlash2Config.from_target(target.config, **self._settings(manifest), **self.own)
        return DFlash2Drafter(
            config,
            activation_checkpointing=self.activation_checkpointing,
            auf_on=self.auf_on,
            base_weight=self.base_weight,
        )


class DSparkSpec(DFlashSpec):
    """A DSpark drafter for the cache's target; `init` may also be a DFlash drafter, the heads then start fresh.

    Args:
        markov_rank: width of the Markov head.
        markov_head_type: vanilla (a slot's bias depends on the token before it), gated (on its hidden state too), rnn
            (on all tokens before it). vLLM and llama.cpp read vanilla alone.
        enable_confidence_head: also learn how likely each slot is accepted, for servers that verify only likely slots.
        sample_from_anchor: a row predicts the token behind it, as published, or its own, as a DFlash drafter's does.
        confidence_weight: of that loss, beside 1 for the tokens' loss.
        more: those of `DFlashSpec`.
    """

    name = "dspark"

    def __init__(
        self,
        markov_rank: int = 256,
        markov_head_type: Literal["vanilla", "gated", "rnn"] = "vanilla",
        enable_confidence_head: bool = True,
        sample_from_anchor: bool = True,
        confidence_weight: float = 1.0,
        **more: Any,
    ) -> None:
        super().__init__(**more)
        if not 0 <= confidence_weight < float("inf"):
            raise UserError(f"confidence_weight: {confidence_weight} found, a finite number from 0 expected")
        self.heads: dict[str, Any] = {
            "markov_rank": markov_rank,
            "markov_head_type": markov_head_type,
            "enable_confidence_head": enable_confidence_head,
            "sample_from_anchor": sample_from_anchor,
        }
        self.confidence_weight = confidence_weight

    def _fresh(self, manifest: Manifest, target: TargetFiles) -> Drafter:
        config = DSparkConfig.from_target(target.config, **self._settings(manifest), **self.heads)
        return DSparkDrafter(
            config,
            activation_checkpointing=self.activation_checkpointing,
            confidence_weight=self.confidence_weight,
        )


class MaskedSpec(DFlashSpec):
    """A drafter without features for the cache's target, with any kind of cache.

    Args:
        num_encoder_layers: causal layers over the tokens, which stand in for the target's features.
        more: those of `DFlashSpec`.
    """

    name = "masked"
    needs_features = False

    def __init__(
        self,
        num_encoder_layers: int = 2,
        **more: Any,
    ) -> None:
        super().__init__(**more)
        self.encoder: dict[str, Any] = {"num_encoder_layers": num_encoder_layers}

    def _fresh(self, manifest: Manifest, target: TargetFiles) -> Drafter:
        identity = manifest.identity
        config = MaskedConfig.from_target(
            target.config,
            block_size=self.block_size,
            taps=(),
            mask_token_id=identity.mask_token_id,
            feature_dim=0,
            vocab_size=identity.vocab_size,
            **self.sizes,
            **self.encoder,
        )
        return MaskedDrafter(config, activation_checkpointing=self.activation_checkpointing)
