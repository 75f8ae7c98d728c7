"""What a build will cost, from a sample that is built for real and thrown away."""

import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from cache_builder.builder import open_build
from cache_builder.config import BuildConfig
from cache_builder.devices import device_of, share_cores
from cache_builder.writer import StorageSpec, begin, write_manifest, write_shard, write_target
from specauf.cache.location import Location
from specauf.errors import UserError
from specauf.progress import progress


@dataclass(frozen=True)
class Estimate:
    """Figures of a whole build, extrapolated.

    Attributes:
        documents: planned.
        sample: documents that were built to find out.
        kept: share of them that were not dropped.
        tokens: of the whole cache.
        supervised_tokens: of the whole cache.
        field_bytes: of the whole cache, by field.
        target_bytes: embedding, head and tokenizer, paid once.
        seconds: of the whole build on as many ranks as configured, without loading the target.
        once_seconds: of these, what is paid once, by the first rank: fitting the sample's features, storing the target.
        tokens_per_second: of one rank, in what grows with the documents.
        drops: of the sample, by reason.
        rival_bytes: the same tokens in DeepSpec's layout.
    """

    documents: int
    sample: int
    kept: float
    tokens: int
    supervised_tokens: int
    field_bytes: dict[str, int]
    target_bytes: int
    seconds: float
    once_seconds: float
    tokens_per_second: float
    drops: dict[str, int]
    rival_bytes: int

    @property
    def total_bytes(self) -> int:
        """Everything on disk."""
        return self.target_bytes + sum(self.field_bytes.values())

    def figures(self) -> dict[str, Any]:
        """For scripts."""
        return {**self.__dict__, "total_bytes": self.total_bytes, "hours": self.seconds / 3600}

    def text(self) -> str:
        """For people."""
        lines = [
            f"{self.documents:,} documents, of which about {self.kept:.0%} are kept: {self.tokens:,} tokens, "
            f"{self.supervised_tokens:,} supervised (from a sample of {self.sample})",
            f"  disk  {_size(self.total_bytes)}; {_size(self.target_bytes)} of it are the target's embedding and head",
            *(f"        {_size(b):>9}  {n}" for n, b in sorted(self.field_bytes.items(), key=lambda i: -i[1])),
            f"        DeepSpec's layout would take {_size(self.rival_bytes)} for the same tokens",
            f"  time  {_time(self.seconds)} at {self.tokens_per_second:,.0f} tokens/s a rank, "
            f"{_time(self.once_seconds)} of it paid once; and loading the target",
        ]
        return "\n".join(lines)


@dataclass
class _Times:
    """Seconds of what grows with the documents, and of what a build pays once however many there are."""

    clock: Callable[[], float]
    growing: float = 0.0
    once: float = 0.0

    @contextlib.contextmanager
    def spent(self, name: Literal["growing", "once"]) -> Iterator[None]:
        started = self.clock()
        yield
        setattr(self, name, getattr(self, name) + self.clock() - started)


def estimate(config: BuildConfig, sample: int | None, clock: Callable[[], float] = time.monotonic) -> Estimate:
    """Build a sample of the planned documents in a temporary directory.

    Args:
        config: of the build.
        sample: documents to build; as many as are answered at once when not given.
        clock: gives seconds.

    Raises:
        UserError: the sample is empty, or as a build.
    """
    if sample is not None and sample < 1:
        raise UserError(f"sample is {sample}, expected 1 or more: set --sample")
    share_cores(config)  # as a rank of the build does, whose time this is to say
    work = open_build(config, device=device_of(config))
    if work.plan.corpus.note:
        print(f"note: {work.plan.corpus.note}", file=sys.stderr)
    count = min(len(work.plan.numbers), config.batch_size if sample is None else sample)
    numbers = sorted({int(n) for n in np.linspace(0, len(work.plan.numbers) - 1, count)})
    times = _Times(clock)
    with times.spent("growing"), progress("estimate", float(len(numbers)), unit="documents", initial=0.0) as show:
        documents, drops = work.maker.make(numbers, lambda _, done: show(float(done)))
    if not documents:
        raise UserError(f"none of {len(numbers)} sampled documents is left ({drops}): raise --sample")
    with tempfile.TemporaryDirectory(prefix="specauf-estimate-") as folder:
        with times.spent("once"):
            codec, _ = work.fit(documents, "raise --sample")
            begin(folder, work.identity)
            write_target(
                folder,
                work.identity,
                config={},
                embed_tokens=work.target.embed_tokens,
                lm_head=None if work.target.tied else work.target.lm_head,
                tokenizer=work.target.tokenizer,
                codec=codec,
            )
        target_bytes = sum(Location(folder).files().values())
        spec = StorageSpec(work.identity, codec, config.compress_features, work.target.device)
        with times.spent("growing"):
            write_shard(folder, 0, documents, spec)
        with times.spent("once"):
            manifest = write_manifest(folder, work.identity, 1)
    scale = len(work.plan.numbers) / len(numbers)
    counts = manifest.counts
    tokens = round(counts.tokens * scale)
    hidden = work.target.hidden_size
    return Estimate(
        documents=len(work.plan.numbers),
        sample=len(numbers),
        kept=len(documents) / len(numbers),
        tokens=tokens,
        supervised_tokens=round(counts.supervised_tokens * scale),
        field_bytes={name: round(f.bytes * scale) for name, f in manifest.fields.items()},
        target_bytes=target_bytes,
        seconds=times.growing * scale / (config.devices * config.num_nodes) + times.once,
        once_seconds=times.once,
        tokens_per_second=counts.tokens / max(1e-9, times.growing),
        drops=drops,
        # bf16 taps and last hidden state, int32 id, two byte masks.
        rival_bytes=tokens * (2 * hidden * (len(work.target.taps) + 1) + 6),
    )


def _size(count: int | float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def _time(seconds: int | float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"
