"""One thing wrong with an export."""

from dataclasses import dataclass
from typing import Any

MISSING = "nothing"


@dataclass(frozen=True)
class Problem:
    """One thing wrong with an export.

    Attributes:
        field: config field or tensor.
        found: what is there.
        expected: what belongs there.
        why: what a server makes of it.
    """

    field: str
    found: Any
    expected: Any
    why: str

    def __str__(self) -> str:
        return f"{self.field}: {self.found} found, {self.expected} expected; {self.why}"
