"""DFlash (arXiv 2602.06036): the target's hidden states enter every layer of the drafter as extra keys and values."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from specauf.drafters.base import Drafter
from specauf.drafters.config import DrafterConfig
from specauf.drafters.files import check_weights, read_zlab, write_zlab
from specauf.drafters.memory import ContextMemory
from specauf.drafters.sketch import fold, unfold
from specauf.drafters.vocabulary import TargetVocabulary
from specauf.errors import UserError
from specauf.linear import Linear


class DFlashDrafter(Drafter):
    """z-lab's drafter with its state-dict names (`fc`, `hidden_norm`, `norm`, `layers.*`): neither embedding nor head.

    Context row of a token: `hidden_norm(fc(features))`, where the features are the target's taps, concatenated.

    Args:
        config: its shape.
        activation_checkpointing: recompute layers in the backward pass.
    """

    name = "dflash"
    needs_features = True
    not_its_own: ClassVar[tuple[str, ...]] = ()  # tensors of the target that others store beside a drafter's

    def __init__(self, config: DrafterConfig, *, activation_checkpointing: bool = False) -> None:
        super().__init__(config, activation_checkpointing=activation_checkpointing)
        if not config.taps:
            raise UserError("taps: none given, at least one expected; a drafter without features is DRAFTER=masked")
        self.fc = Linear(config.feature_dim, config.hidden_size, bias=False)
        self.hidden_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.reset_parameters()

    def context_rows(
        self,
        tokens: Int[Tensor, " tokens"],
        positions: Int[Tensor, " tokens"],
        doc_offsets: Int[Tensor, " docs_plus_1"],
        features: Float[Tensor, "tokens features"] | None,
        vocabulary: TargetVocabulary,
    ) -> Float[Tensor, "tokens hidden"]:
        """Project the features; tokens and positions do not matter."""
        assert features is not None
        return self.hidden_norm(self.fc(features))

    def next_context_rows(
        self,
        memory: ContextMemory,
        tokens: Int[Tensor, "prompts rows"],
        positions: Int[Tensor, "prompts rows"],
        features: Float[Tensor, "prompts rows features"] | None,
        vocabulary: TargetVocabulary,
    ) -> Float[Tensor, "prompts rows hidden"]:
        """Project the features."""
        assert features is not None
        return self.hidden_norm(self.fc(features))

    @property
    def servable(self) -> bool:
        """`fc` reads raw features, as servers give them, and not a sketch."""
        return self.config.feature_dim == self.config.raw_feature_dim

    def with_fc(self, weight: Float[Tensor, "hidden features"]) -> "DFlashDrafter":
        """A copy of this drafter with another `fc`, over as many features as the weight has columns."""
        other = copy.deepcopy(self)
        other.config = replace(self.config, feature_dim=weight.shape[1])
        other.fc = Linear(weight.shape[1], weight.shape[0], bias=False, dtype=self.fc.weight.dtype)
        other.fc.weight.data.copy_(weight)
        return other

    def fold_sketch(self, sketch: Mapping[str, Tensor]) -> "DFlashDrafter":
        """The servable drafter: `fc` over raw features instead of their sketch `y = P^T S^-1 x`, with the same output.

        Args:
            sketch: `basis` P [features, rank] and `scale` S [features], as the cache stores them.
        """
        return self.with_fc(fold(self.fc.weight, sketch))

    def unfold_sketch(self, sketch: Mapping[str, Tensor]) -> "DFlashDrafter":
        """A drafter that reads the sketch instead of raw features, to go on training on a cache of sketches.

        Its output is the same for features that the sketch keeps whole; the rest of `fc` is lost.
        """
        return self.with_fc(unfold(self.fc.weight, sketch))

    def save_pretrained(self, directory: Path | str, *, dtype: torch.dtype | None = None) -> None:
        """Write `config.json` and `model.safetensors` in z-lab's layout.

        Args:
            directory: made if need be.
            dtype: of the stored weights; their own when None.

        Raises:
            UserError: `fc` still reads a sketch, or a weight is not finite.
        """
        if not self.servable:
            raise UserError(
                f"fc: reads a sketch of {self.config.feature_dim} numbers, {self.config.raw_feature_dim} raw features "
                "expected by servers; fold the cache's sketch basis first"
            )
        write_zlab(Path(directory), self.config, self.state_dict(), dtype or self.norm.weight.dtype)

    @classmethod
    def from_pretrained(cls, directory: Path | str) -> "DFlashDrafter":
        """Read a z-lab directory, ours or a released one, in fp32 on the CPU and in evaluation mode.

        Raises:
            UserError: files, fields or tensors are missing, unknown or of another shape.
        """
        config, weights = read_zlab(Path(directory), cls.config_class)
        weights = {name: value for name, value in weights.items() if name not in cls.not_its_own}
        drafter = cls(config)
        check_weights(Path(directory), drafter, weights)
        drafter.load_state_dict(weights)
        return drafter.eval()
