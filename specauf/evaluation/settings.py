"""How a benchmark is decoded."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from specauf.decoding.rules import Sampling, make_rule
from specauf.errors import UserError


def distinct(field: str, values: Sequence[Any]) -> None:
    """Refuse an empty list, and one that names something twice.

    Raises:
        UserError: naming the field and the value.
    """
    if not values:
        raise UserError(f"{field}: none given, at least one expected")
    for value in values:
        if values.count(value) > 1:
            raise UserError(f"{field}: {value} given twice, one expected; leave one out")


@dataclass(frozen=True)
class Setting:
    """One way of decoding.

    Attributes:
        max_new_tokens: length of an answer.
        temperature: 0 is greedy.
        top_k: sample among the k most probable tokens.
        top_p: sample among the most probable tokens that hold this mass.
        sampling: how drafts are drawn and accepted above temperature 0.
        block_size: a shorter block than the drafters were trained with; the trained one when None.
        seed: of the random numbers; every prompt draws others, and all drafters the same.
    """

    max_new_tokens: int
    temperature: int | float = 0.0
    top_k: int | None = None
    top_p: int | float | None = None
    sampling: Sampling = "rejection"
    block_size: int | None = None
    seed: int = 0

    @property
    def greedy(self) -> bool:
        """Whether plain decoding has one right answer."""
        return self.temperature == 0

    @property
    def name(self) -> str:
        """In reports."""
        parts = ["greedy" if self.greedy else f"T={self.temperature:g}"]
        if not self.greedy:
            parts += [f"{key}={value:g}" for key, value in (("top_k", self.top_k), ("top_p", self.top_p)) if value]
            parts += [self.sampling]
        return ", ".join(parts + ([f"block {self.block_size}"] if self.block_size else []))

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"name": self.name}


def make_settings(
    max_new_tokens: int,
    temperatures: Sequence[int | float],
    block_sizes: Sequence[int | None],
    top_k: int | None,
    top_p: int | float | None,
    sampling: Sampling,
    seed: int,
) -> list[Setting]:
    """Every temperature with every block size.

    Raises:
        UserError: a number is out of its range.
    """
    if max_new_tokens < 2:
        raise UserError(f"max_new_tokens is {max_new_tokens}: give at least 2; the first token is never drafted")
    for name, values in (("temperatures", temperatures), ("block_sizes", block_sizes)):
        distinct(name, values)
    for temperature in temperatures:
        make_rule(temperature, top_k, top_p, sampling, None)  # refuses what decoding would refuse, before any loading
    asked = {"top_k": (top_k, None), "top_p": (top_p, None), "sampling": (sampling, "rejection")}
    for name, (found, default) in asked.items():
        if found != default and not any(temperatures):
            raise UserError(f"{name} is {found}, but all temperatures are 0, which draws nothing: give one above 0")
    return [
        Setting(max_new_tokens, t, None if t == 0 else top_k, None if t == 0 else top_p, sampling, block, seed)
        for t in temperatures
        for block in block_sizes
    ]
