"""How far the drafter is from what a slot should say: l[b, k].

`distillation.py` holds the divergences from the target's sparse distribution.
"""

from abc import ABC, abstractmethod

from jaxtyping import Float
from torch import Tensor

from specauf.errors import UserError
from specauf.objectives.evidence import DraftReading, Teacher


class Divergence(ABC):
    """A differentiable number per slot; its value where a slot is not valid is of no consequence, but finite.

    Attributes:
        needs_teacher: it compares with the target's distribution, so the cache must hold log-probs.
        slot_by_slot: l of a slot depends on no other slot of its block.
    """

    needs_teacher: bool = False
    slot_by_slot: bool = True

    @abstractmethod
    def __call__(self, draft: DraftReading, teacher: Teacher | None) -> Float[Tensor, "blocks slots"]:
        """The loss of each slot, in nats, or a probability for the alpha family."""


class CrossEntropy(Divergence):
    """l = -log q(y), y the label the objective chose (data token or the target's top-1)."""

    def __call__(self, draft: DraftReading, teacher: Teacher | None) -> Float[Tensor, "blocks slots"]:
        """See the class."""
        return -draft.label


class Mixture(Divergence):
    """l = sum_i mix_weights[i] * parts[i].

    Args:
        parts: divergences to add.
        mix_weights: one factor for each part.
    """

    def __init__(self, parts: list[Divergence], mix_weights: list[float]):
        if not parts or len(parts) != len(mix_weights):
            raise UserError(
                f"loss mix_weights has {len(mix_weights)} values for {len(parts)} parts: give one for each part"
            )
        self.parts = parts
        self.mix_weights = mix_weights
        self.needs_teacher = any(part.needs_teacher for part in parts)
        self.slot_by_slot = all(part.slot_by_slot for part in parts)

    def __call__(self, draft: DraftReading, teacher: Teacher | None) -> Float[Tensor, "blocks slots"]:
        """See the class."""
        return sum(
            (w * part(draft, teacher) for w, part in zip(self.mix_weights[1:], self.parts[1:], strict=True)),
            self.mix_weights[0] * self.parts[0](draft, teacher),
        )
