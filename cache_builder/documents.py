"""From conversations to documents of the cache: tokenise, run the target, drop what is not worth keeping."""

import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Int

from cache_builder.chat import ChatRenderer, TemplateRefusesError
from cache_builder.config import BuildConfig
from cache_builder.document import BuiltDocument
from cache_builder.formats import Conversation
from cache_builder.generate import answer_all
from cache_builder.plan import Plan
from cache_builder.sparse import keep_mass
from cache_builder.target import Target
from cache_builder.teacher import read_all
from specauf.errors import UserError

Advance = Callable[[int, float], object]
Tokens = TypeVar("Tokens")
# Greedy answers that loop do so to their end; and whole long texts compress well without looping.
LOOP_BYTES = 512


@dataclass(frozen=True)
class DocumentMaker:
    """Builds a shard's documents.

    Attributes:
        config: of the build.
        plan: which documents.
        target: runs over them.
        renderer: of the target's tokenizer.
        mask_token: a document that holds it cannot be told from drafted slots.
    """

    config: BuildConfig
    plan: Plan
    target: Target
    renderer: ChatRenderer
    mask_token: int

    def make(
        self, numbers: Iterable[int], advance: Advance = lambda tokens, documents: None
    ) -> tuple[list[BuiltDocument], dict[str, int]]:
        """Documents of the plan by number, and how many were left out for which reason.

        Args:
            numbers: rising.
            advance: called with the tokens and documents' worth of work of each step.

        Raises:
            UserError: the target gives NaN or Inf.
        """
        drops: Counter[str] = Counter()
        made = (self._answer if self.config.regenerate else self._read)(list(numbers), drops, advance)
        kept = []
        for document in made:
            reason = self._fault(document)
            if reason is None:
                kept.append(document)
            else:
                drops[reason] += 1
        return kept, dict(drops)

    def _answer(self, numbers: list[int], drops: Counter[str], advance: Advance) -> list[BuiltDocument]:
        """Let the target answer the questions."""
        prompts, kept = [], []
        for number in numbers:
            ids = self._tokens(self.renderer.prompt_ids, self.plan.conversation(number), drops)
            reason = None if ids is None else self._unanswerable(ids)
            if ids is None or reason is not None:
                if reason is not None:
                    drops[reason] += 1
                advance(0, 1.0)
                continue
            self._require_rows(ids)
            prompts.append(ids)
            kept.append(number)
        if not prompts:
            return []
        answers = answer_all(
            self.target,
            prompts,
            max_new_tokens=self.config.max_new_tokens,
            batch_size=self.config.batch_size,
            sampling=self.config.sampling,
            seeds=[int(self.plan.numbers[n]) for n in kept],
            features=self.config.features != "none",
            advance=advance,
        )
        documents = []
        for number, answer in zip(kept, answers, strict=True):
            mask = np.arange(len(answer.tokens)) >= answer.prompt_tokens
            documents.append(
                self._document(number, answer.tokens, mask, answer.topk_ids, answer.topk_logprobs, answer.features)
            )
        return documents

    def _read(self, numbers: list[int], drops: Counter[str], advance: Advance) -> list[BuiltDocument]:
        """Read the answers that are given."""
        given, kept = [], []
        for number in numbers:
            found = self._tokens(self.renderer.document, self.plan.conversation(number), drops)
            reason = None if found is None else self._unreadable(*found)
            if found is None or reason is not None:
                if reason is not None:
                    drops[reason] += 1
                advance(0, 1.0)
                continue
            self._require_rows(found[0])
            given.append(found)
            kept.append(number)
        if not given:
            return []
        read = read_all(
            self.target,
            given,
            batch_tokens=self.config.batch_tokens,
            features=self.config.features != "none",
            advance=advance,
        )
        return [
            self._document(number, tokens, mask, *result)
            for number, (tokens, mask), result in zip(kept, given, read, strict=True)
        ]

    def _tokens(
        self, tokenize: Callable[[Conversation], Tokens], conversation: Conversation, drops: Counter[str]
    ) -> Tokens | None:
        try:
            return tokenize(conversation)
        except TemplateRefusesError as refused:
            drops[refused.reason] += 1
            return None

    def _require_rows(self, tokens: Int[np.ndarray, " tokens"]) -> None:
        largest = int(tokens.max(initial=0))
        if largest >= self.target.vocab_size:
            raise UserError(
                f"the tokenizer gives id {largest}, target {self.target.name} has embeddings for "
                f"{self.target.vocab_size}: the tokenizer does not belong to this target"
            )

    def _unanswerable(self, prompt: Int[np.ndarray, " tokens"]) -> str | None:
        if len(prompt) > self.config.max_length - self.config.max_new_tokens:
            return "over_long"
        return "mask_token" if (prompt == self.mask_token).any() else None

    def _unreadable(self, tokens: Int[np.ndarray, " tokens"], mask: Bool[np.ndarray, " tokens"]) -> str | None:
        if len(tokens) > self.config.max_length:
            return "over_long"
        return "too_short" if mask[1:].sum() < self.config.min_answer_tokens else None

    def _document(
        self,
        number: int,
        tokens: np.ndarray,
        mask: np.ndarray,
        topk_ids: np.ndarray,
        topk_logprobs: np.ndarray,
        features: torch.Tensor | None,
    ) -> BuiltDocument:
        if self.config.keep_mass is not None:
            topk_logprobs = keep_mass(torch.from_numpy(topk_logprobs), self.config.keep_mass).numpy()
        return BuiltDocument(
            tokens=tokens,
            loss_mask=mask,
            row_index=np.flatnonzero(mask) - 1,
            topk_ids=topk_ids,
            topk_logprobs=topk_logprobs,
            features=features,
            held_out=bool(self.plan.held_out[number]),
        )

    def _fault(self, document: BuiltDocument) -> str | None:
        """Why a finished document is not kept."""
        answer = document.tokens[document.loss_mask]
        if len(answer) < self.config.min_answer_tokens:
            return "too_short"
        if (document.tokens == self.mask_token).any():
            return "mask_token"
        text = self.target.tokenizer.decode(answer, skip_special_tokens=True)
        if not text.strip():
            return "empty_answer"
        return "looping" if compression(text) > self.config.max_compression else None


def compression(text: str) -> float:
    """How many times smaller zlib makes the end of a text: about 2 for prose and code, from 2.4 to 3 on it loops."""
    data = text.encode()[-LOOP_BYTES:]
    return len(data) / max(1, len(zlib.compress(data)))
