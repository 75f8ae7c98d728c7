"""What a build is told: one flat record, so that every field is an option of the same name."""

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

from cache_builder.formats import Format
from cache_builder.sampling import Sampling
from specauf.cache.schema import FeatureKind
from specauf.errors import UserError
from specauf.targets import TargetConfig

# Tokens that a shard is meant to hold at most: bounds the builder's memory, and the reader's.
SHARD_TOKENS = 131_072
# What a build was told is kept in the cache under this name, so that a repair needs nothing else.
BUILD = "build.json"
# Settings that say where and on what a build runs, not what it makes.
_PLACES = ("out", "devices", "num_nodes", "accelerator")


@dataclass(frozen=True)
class BuildConfig:
    """Everything that `cache-builder build` can be told.

    Attributes:
        target: the model to run; mostly from `--config configs/target/NAME.yaml`.
        corpus: `python-stdlib`, a JSONL, Parquet or text file, a directory of these, or a hub data set's id.
        out: directory or fsspec URL of the cache.
        corpus_format: layout of the corpus' rows; found out when not given.
        corpus_subset: configuration of a hub data set.
        corpus_split: split of a hub data set.
        corpus_revision: branch, tag or commit of a hub data set.
        max_documents: stop reading the corpus after so many documents; empty and repeated ones do not count, and those
            left out later are not replaced.
        max_tokens: stop when so many tokens are planned; an answer counts as max_new_tokens.
        max_length: leave out documents of more tokens than this; a prompt counts with its longest answer.
        held_out: share of documents for validation, chosen by a hash of the question.
        regenerate: let the target answer; otherwise the corpus' own answers are kept.
        max_new_tokens: longest answer.
        batch_size: prompts answered at once.
        temperature: 0 answers greedily, so that replaying the cache is exact.
        sample_top_k: draw sampled answers from so many most probable tokens; at most k.
        sample_top_p: draw sampled answers from the most probable tokens that hold this mass.
        seed: of sampled answers.
        min_answer_tokens: leave out documents with fewer supervised tokens.
        max_compression: leave out answers whose last 512 bytes zlib makes more times smaller: they loop.
        batch_tokens: tokens of one pass over given answers.
        k: log-probabilities kept for each supervised token.
        keep_mass: keep only the fewest of these that reach this probability together.
        features: how the taps are stored.
        sketch_rank: numbers per token of a sketch; the target's hidden size when not given.
        compress_features: compress the features' arrays: takes a third off a sketch and bf16, a sixth off int8; reading
            a sketch works twice as long.
        fit_tokens: tokens that a sketch or scales are fitted on, of the first shard.
        documents_per_shard: documents read for one shard; chosen by max_length when not given.
        devices: processes on this node.
        num_nodes: nodes.
        accelerator: what they run on.
    """

    target: TargetConfig
    corpus: str
    out: str
    corpus_format: Format | None = None
    corpus_subset: str | None = None
    corpus_split: str = "train"
    corpus_revision: str | None = None
    max_documents: int | None = None
    max_tokens: int | None = None
    max_length: int = 2048
    held_out: float = 0.05
    regenerate: bool = True
    max_new_tokens: int = 512
    batch_size: int = 64
    temperature: float = 0.0
    sample_top_k: int = 20
    sample_top_p: float = 1.0
    seed: int = 0
    min_answer_tokens: int = 4
    max_compression: float = 3.0
    batch_tokens: int = 4096
    k: int = 32
    keep_mass: float | None = None
    features: FeatureKind = "sketch"
    sketch_rank: int | None = None
    compress_features: bool = False
    fit_tokens: int = 16_384
    documents_per_shard: int | None = None
    devices: int = 1
    num_nodes: int = 1
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"

    def __post_init__(self) -> None:
        for name, low in _AT_LEAST.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise UserError(f"{name} is {value}, expected {low} or more: set --{name}")
        if not 0 <= self.held_out <= 1:
            raise UserError(f"held_out is {self.held_out}, expected a share from 0 to 1: set --held_out")
        # Every row keeps its first entry, so nothing of it cannot be asked for.
        if self.keep_mass is not None and not 0 < self.keep_mass <= 1:
            raise UserError(f"keep_mass is {self.keep_mass}, expected a share above 0, up to 1: set --keep_mass")
        if self.temperature < 0:
            raise UserError(f"temperature is {self.temperature}, expected 0 (greedy) or more: set --temperature")
        if self.regenerate and self.max_new_tokens >= self.max_length:
            raise UserError(
                f"max_new_tokens is {self.max_new_tokens}, max_length is {self.max_length}: no prompt would fit; "
                "raise --max_length"
            )
        if self.regenerate and self.max_new_tokens < self.min_answer_tokens:
            raise UserError(
                f"max_new_tokens is {self.max_new_tokens}, min_answer_tokens is {self.min_answer_tokens}: no answer "
                "would be kept; raise --max_new_tokens or lower --min_answer_tokens"
            )
        if sampling := self.sampling:
            sampling.require_valid(self.k)

    @property
    def sampling(self) -> Sampling | None:
        """How answers are drawn; None when they are greedy or the corpus' own."""
        if not self.regenerate or self.temperature == 0:
            return None
        return Sampling(self.temperature, self.sample_top_k, self.sample_top_p, self.seed)

    @property
    def shard_documents(self) -> int:
        """Documents read for one shard."""
        if self.documents_per_shard is not None:
            return self.documents_per_shard
        return min(1024, max(16, SHARD_TOKENS // self.max_length))


_AT_LEAST: dict[str, int] = {
    "max_documents": 1, "max_tokens": 1, "max_length": 2, "max_new_tokens": 1, "batch_size": 1, "min_answer_tokens": 1,
    "max_compression": 1, "batch_tokens": 1, "k": 1, "sketch_rank": 1, "fit_tokens": 1, "documents_per_shard": 1,
    "devices": 1, "num_nodes": 1, "seed": 0,
}  # fmt: skip


def told(config: BuildConfig) -> bytes:
    """A build's settings as JSON, without those that say where and on what it runs."""
    settings = {name: value for name, value in asdict(config).items() if name not in _PLACES}
    return (json.dumps(settings, indent=1, sort_keys=True) + "\n").encode()


def read_told(data: bytes, out: str, **places: Any) -> BuildConfig:
    """The build that `told` wrote down.

    Args:
        data: the JSON.
        out: the cache.
        places: `devices` and the like.

    Raises:
        UserError: it is damaged, or of another version.
    """
    try:
        settings = json.loads(data)
        target = settings.pop("target")
        target["taps"] = None if target["taps"] is None else tuple(target["taps"])
        return BuildConfig(TargetConfig(**target), out=out, **settings, **places)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{out}/{BUILD} cannot be read ({error}): run the build's own command again instead") from error
