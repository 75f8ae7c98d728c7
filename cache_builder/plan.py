"""Which documents a cache gets, and in which shard: decided before the target is loaded, the same on every rank."""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int64

from cache_builder.config import BuildConfig
from cache_builder.corpus import Corpus, CorpusConfig, open_corpus
from cache_builder.formats import Conversation, Message
from specauf.errors import UserError
from specauf.progress import progress


@dataclass(frozen=True)
class Plan:
    """The documents to build.

    Attributes:
        corpus: holds them.
        numbers: their numbers in the corpus, rising.
        held_out: which of them validate.
        drops: documents left out already, by reason.
        fingerprint: sha256 over the contents of the documents, in order.
        per_shard: documents of a shard; the last one has fewer.
    """

    corpus: Corpus
    numbers: Int64[np.ndarray, " documents"]
    held_out: Bool[np.ndarray, " documents"]
    drops: dict[str, int]
    fingerprint: str
    per_shard: int

    @property
    def num_shards(self) -> int:
        """How many shards the documents fill."""
        return -(-len(self.numbers) // self.per_shard)

    def shard(self, number: int) -> range:
        """A shard's documents, counted in the plan."""
        start = number * self.per_shard
        return range(start, min(len(self.numbers), start + self.per_shard))

    def conversation(self, document: int) -> Conversation:
        """A document by its number in the plan."""
        return self.corpus[int(self.numbers[document])]


def make_plan(config: BuildConfig) -> Plan:
    """Read the corpus once: leave out empty documents and duplicates, and choose the held-out split.

    Raises:
        UserError: the corpus cannot be read, a row is broken, or nothing is left.
    """
    corpus = open_corpus(
        CorpusConfig(
            config.corpus, config.corpus_format, config.corpus_subset, config.corpus_split, config.corpus_revision
        )
    )
    seen: set[bytes] = set()
    numbers: list[int] = []
    held_out: list[bool] = []
    drops: Counter[str] = Counter()
    digest = hashlib.sha256()
    characters = 0
    limit = len(corpus) if config.max_documents is None else min(len(corpus), config.max_documents)
    with progress("read corpus", float(limit), unit="documents", initial=0.0) as advance:
        for number, conversation in enumerate(corpus):
            reason, key, question = _look(conversation, config, corpus, number)
            if reason is None and key in seen:
                reason = "duplicate"
            if reason is not None:
                drops[reason] += 1
                continue
            seen.add(key)
            numbers.append(number)
            held_out.append(int.from_bytes(question[:8], "big") < config.held_out * 2**64)
            digest.update(key)
            characters += len(conversation.text or "")
            characters += sum(len(m.content) + len(m.reasoning) for m in conversation.messages)
            advance(1.0)
            if len(numbers) == limit:  # not a row later: what is not built from may be broken
                break
            if config.max_tokens is not None and _planned_tokens(config, len(numbers), characters) >= config.max_tokens:
                break
    if not numbers:
        counts = ", ".join(f"{n} {reason}" for reason, n in drops.items())
        raise UserError(f"corpus {config.corpus}: no document is left of {len(corpus)} ({counts}): nothing to build")
    return Plan(corpus, np.array(numbers), np.array(held_out), dict(drops), digest.hexdigest(), config.shard_documents)


def _planned_tokens(config: BuildConfig, documents: int, characters: int) -> float:
    """Tokens of the documents chosen so far, at four characters a token; no tokenizer is there yet."""
    return characters / 4 + (documents * config.max_new_tokens if config.regenerate else 0)


def _look(
    conversation: Conversation, config: BuildConfig, corpus: Corpus, number: int
) -> tuple[str | None, bytes, bytes]:
    """Why to leave a document out (or None), the digest of all that is used of it, and of its question."""
    if conversation.text is not None:
        if config.regenerate:
            raise UserError(
                f"{corpus.where(number)} is plain text, which asks the target nothing: add --regenerate=false to keep "
                "it as it is"
            )
        text = _digest(conversation.text)
        return (None if conversation.text.strip() else "empty"), text, text
    question = conversation.question
    asked = any(m.role != "system" and m.content.strip() for m in question)
    if config.regenerate:
        key = _digest(_canonical(question))
        return (None if asked else "empty"), key, key
    whole = _digest(_canonical(conversation.messages))
    return (None if asked and conversation.answered else "empty"), whole, _digest(_canonical(question))


def _canonical(messages: tuple[Message, ...]) -> str:
    turns = [[m.role, m.content, *([m.reasoning] if m.reasoning else [])] for m in messages]
    return json.dumps(turns, ensure_ascii=True)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
