"""What a cache is made from, gathered from the build's settings, the plan and the target."""

import datetime
import hashlib
import json
from pathlib import Path
from typing import Any

import specauf
from cache_builder.config import BuildConfig
from cache_builder.dates import DATE
from cache_builder.plan import Plan
from cache_builder.target import Target
from cache_builder.writer import tokenizer_files
from specauf.cache.schema import Identity
from specauf.errors import UserError
from specauf.targets import mask_token_id, target_identity

# Settings that change what is stored.
_CORPUS = (
    "corpus_format", "corpus_subset", "corpus_split", "corpus_revision", "max_length", "held_out",
    "min_answer_tokens", "max_compression", "fit_tokens", "batch_tokens",
)  # fmt: skip
_ANSWERS = ("max_new_tokens", "batch_size")
_SAMPLING = ("temperature", "sample_top_k", "sample_top_p", "seed")


def make_identity(config: BuildConfig, plan: Plan, target: Target, date: datetime.date | None = None) -> Identity:
    """The identity of the cache that a build makes: whatever may change a stored number is in it.

    Args:
        config: of the build.
        plan: which documents.
        target: runs over them.
        date: that its prompts name, where its template asks for one.

    Raises:
        UserError: the mask token is not set or is no single token, or no sketch can have the rank that is set.
    """
    return Identity(
        target=target_identity(config.target),
        tokenizer_hash=tokenizer_hash(target.tokenizer),
        chat_template_hash=template_hash(target.tokenizer, config.target.template_options),
        vocab_size=target.vocab_size,
        hidden_size=target.hidden_size,
        num_target_layers=target.num_layers,
        taps=tuple(target.taps),
        k=config.k,
        top_p=config.keep_mass,
        mask_token_id=mask_token_id(config.target, target.tokenizer, target.vocab_size),
        target_dtype=config.target.dtype,
        features=config.features,
        sketch_rank=_sketch_rank(config, len(target.taps), target.hidden_size),
        corpus=_corpus(config, plan) | ({} if date is None else {DATE: date.isoformat()}),
        regeneration=_regeneration(config),
        code_version=specauf.__version__,
    )


def _sketch_rank(config: BuildConfig, taps: int, hidden_size: int) -> int:
    """Columns of the sketch; refused here, what the first shard's features would be thrown away for."""
    if config.features != "sketch":
        return 0
    rank = config.sketch_rank or hidden_size
    if rank > taps * hidden_size:
        raise UserError(
            f"sketch_rank is {rank}, {taps} taps of {hidden_size} channels allow 1 to {taps * hidden_size}: "
            "set --sketch_rank"
        )
    if rank > config.fit_tokens:
        raise UserError(
            f"sketch_rank is {rank}, fit_tokens is {config.fit_tokens}, expected as many or more: "
            "lower --sketch_rank or raise --fit_tokens"
        )
    return rank


def _corpus(config: BuildConfig, plan: Plan) -> dict[str, Any]:
    counts = {"fingerprint": plan.fingerprint, "documents": len(plan.numbers), "documents_per_shard": plan.per_shard}
    return {"name": config.corpus} | counts | {name: getattr(config, name) for name in _CORPUS}


def _regeneration(config: BuildConfig) -> dict[str, Any]:
    if not config.regenerate:
        return {}
    sampled = _SAMPLING if config.sampling is not None else ()
    return {"greedy": config.sampling is None} | {name: getattr(config, name) for name in (*_ANSWERS, *sampled)}


def tokenizer_hash(tokenizer: Any) -> str:
    """Digest of the files that a tokenizer saves."""
    digest = hashlib.sha256()
    for name, data in tokenizer_files(tokenizer).items():
        digest.update(Path(name).name.encode() + b"\0" + data)
    return digest.hexdigest()


def template_hash(tokenizer: Any, options: dict[str, Any]) -> str:
    """Digest of the chat template and the options it is given; empty when there is none."""
    template = getattr(tokenizer, "chat_template", None)
    if not (template or options.get("chat_template")):
        return ""
    return hashlib.sha256(json.dumps([template, options], sort_keys=True).encode()).hexdigest()
