"""What decoding gives back."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Cycle:
    """One draft-verify cycle of one prompt.

    Attributes:
        tokens: tokens it put out: the accepted ones, then the target's own unless the output ended before it.
        accepted: A, drafted tokens among `tokens`.
        drafted: slots drafted and verified.
        prompt: which prompt of the batch.
        number: 0 for the prompt's own pass, which puts out one token and drafts nothing; then 1, 2, ...
        draft_seconds: drafting, for the whole batch.
        verify_seconds: the target's pass, for the whole batch.
        other_seconds: the rest of the cycle.
    """

    tokens: list[int]
    accepted: int
    drafted: int
    prompt: int
    number: int
    draft_seconds: float
    verify_seconds: float
    other_seconds: float


@dataclass
class DecodeResult:
    """Everything that decoding one prompt gave.

    Attributes:
        tokens: the answer, prompt excluded; ends with a stop token if one came.
        accepted: A of every cycle, the accepted tokens that were put out. The first token comes with the prompt's own
            pass and belongs to no cycle.
        drafted: slots verified in every cycle.
        prefill_seconds: reading the prompt and choosing the first token.
        draft_seconds: drafting, over all cycles.
        verify_seconds: the target's passes over the blocks.
        other_seconds: the rest: choosing, committing, cropping.
    """

    tokens: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    drafted: list[int] = field(default_factory=list)
    prefill_seconds: float = 0.0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    other_seconds: float = 0.0

    def add(self, cycle: Cycle) -> None:
        """Append what one cycle put out."""
        self.tokens += cycle.tokens
        if cycle.number == 0:
            self.prefill_seconds += cycle.verify_seconds + cycle.other_seconds
            return
        self.accepted.append(cycle.accepted)
        self.drafted.append(cycle.drafted)
        self.draft_seconds += cycle.draft_seconds
        self.verify_seconds += cycle.verify_seconds
        self.other_seconds += cycle.other_seconds

    @property
    def cycles(self) -> int:
        """Draft-verify cycles."""
        return len(self.accepted)

    @property
    def seconds(self) -> float:
        """Wall time, the prompt's own pass included."""
        return self.prefill_seconds + self.draft_seconds + self.verify_seconds + self.other_seconds

    @property
    def tau(self) -> float:
        """Mean emitted length A + 1 of the cycles; NaN without any."""
        return sum(self.accepted) / self.cycles + 1 if self.cycles else float("nan")
