"""What a run's config says about its drafter; the rest comes from the cache's target."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from specauf.cache import Manifest
from specauf.cache.target import TargetFiles
from specauf.drafters.base import Drafter
from specauf.drafters.config import DrafterConfig
from specauf.drafters.dflash import DFlashDrafter
from specauf.errors import UserError, unknown_name

_CLASSES: dict[str, type[Drafter]] = {DFlashDrafter.name: DFlashDrafter}


def build_drafter(name: str, config: dict[str, Any]) -> Drafter:
    """An untrained drafter of a kind, from the dict that its `config.to_dict()` gave.

    Raises:
        UserError: there is no such kind.
    """
    if name not in _CLASSES:
        raise unknown_name("drafter", name, _CLASSES)
    kind = _CLASSES[name]
    return kind(kind.config_class.from_dict(config))


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
        activation_checkpointing: recompute layers in the backward pass, to save memory.
        init: a z-lab directory to start from instead of random weights; it decides all of the shape.
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
        activation_checkpointing: bool = False,
        init: Path | None = None,
    ) -> None:
        self.block_size = block_size
        self.activation_checkpointing = activation_checkpointing
        self.init = init
        self.sizes: dict[str, Any] = {
            "num_hidden_layers": num_hidden_layers,
            "num_attention_heads": num_attention_heads,
            "num_key_value_heads": num_key_value_heads,
            "head_dim": head_dim,
            "intermediate_size": intermediate_size,
        }

    def build(self, manifest: Manifest, target: TargetFiles) -> DFlashDrafter:
        """The drafter for a cache's target.

        Raises:
            UserError: the cache has no features, or `init` is another target's.
        """
        identity = manifest.identity
        if identity.features == "none":
            raise UserError(
                "features: none in the cache, the dflash drafter needs them; train DRAFTER=masked, or rebuild the cache"
            )
        config = DrafterConfig.from_target(
            target.config,
            block_size=self.block_size,
            taps=identity.taps,
            mask_token_id=identity.mask_token_id,
            feature_dim=identity.sketch_rank if identity.features == "sketch" else None,
            vocab_size=identity.vocab_size,
            **self.sizes,
        )
        if self.init is None:
            return DFlashDrafter(config, activation_checkpointing=self.activation_checkpointing)
        drafter = DFlashDrafter.from_pretrained(self.init)
        check_same_target(self.init, drafter.config, config)
        drafter.activation_checkpointing = self.activation_checkpointing
        return drafter.train()


def check_same_target(directory: Path, found: DrafterConfig, expected: DrafterConfig) -> None:
    """Refuse a checkpoint that was made for something else than this cache.

    Raises:
        UserError: naming the first field that differs, with both values.
    """
    for name in (
        "hidden_size",
        "vocab_size",
        "num_target_layers",
        "taps",
        "feature_dim",
        "mask_token_id",
        "block_size",
    ):
        if getattr(found, name) != getattr(expected, name):
            raise UserError(
                f"{name}: {getattr(found, name)} in {directory}, {getattr(expected, name)} in the cache and config; "
                "use the cache of that drafter's target, or change the config"
            )
