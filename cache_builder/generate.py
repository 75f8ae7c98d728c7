"""Answering prompts in batches while keeping features and top-k of every token, so that no second pass is needed.

Rows of a batch are slots of one key-value cache. Prompts come sorted by length, so that little of the cache is padding;
a row that has ended leaves the batch, and the last live row takes its slot.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cache_builder.kv_cache import SlotCache
from cache_builder.prefill import Prefix, common_prefix, prefill
from cache_builder.sampling import Sampling
from cache_builder.target import Target


@dataclass(frozen=True)
class Answer:
    """What the target said to one prompt.

    Attributes:
        tokens: prompt and answer.
        prompt_tokens: how many of them are the prompt.
        topk_ids: most probable tokens for each answer token, the first row's belong to the last prompt token.
        topk_logprobs: their log-probabilities in nats.
        features: taps of every token; None when they are not wanted.
        ended: the answer ends with a stop token, so it was not cut by the length limit.
    """

    tokens: Int[np.ndarray, " tokens"]
    prompt_tokens: int
    topk_ids: Int[np.ndarray, "answer_tokens k"]
    topk_logprobs: Float[np.ndarray, "answer_tokens k"]
    features: Float[Tensor, "tokens features"] | None
    ended: bool


@torch.inference_mode()
def answer_all(
    target: Target,
    prompts: Sequence[Int[np.ndarray, " _"]],
    *,
    max_new_tokens: int,
    batch_size: int,
    sampling: Sampling | None = None,
    seeds: Sequence[int] | None = None,
    features: bool = True,
    advance: Callable[[int, float], object] = lambda tokens, documents: None,
) -> list[Answer]:
    """Answer prompts greedily, or sampled; the same prompts and settings give the same answers.

    Args:
        target: answers.
        prompts: token ids, at least one each.
        max_new_tokens: longest answer.
        batch_size: rows at once.
        sampling: None answers greedily.
        seeds: of each prompt's random numbers; its number in the list by default.
        features: keep the taps.
        advance: called with the tokens that each step made and the documents' worth of work that it was.

    Returns:
        One answer for each prompt, in their order.
    """
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    seeds = range(len(prompts)) if seeds is None else seeds
    place = target.place_for_features(sum(map(len, prompts)) + len(prompts) * max_new_tokens) if features else None
    answers: dict[int, Answer] = {}
    cache: SlotCache | None = None
    prefix: Prefix | None = None
    # The longest go first: their cache has room for every later batch.
    for end in range(len(order), 0, -batch_size):
        numbers = order[max(0, end - batch_size) : end]
        batch = [prompts[i] for i in numbers]
        if cache is None:
            cache = target.new_cache(len(batch), max(map(len, batch)) + max_new_tokens)
            prefix = common_prefix(target, cache, prompts, place)
        uniforms = None if sampling is None else sampling.uniforms([seeds[i] for i in numbers], max_new_tokens)
        work = _Batch(target, batch, cache, prefix, max_new_tokens, place)
        work.run(sampling, uniforms, advance)
        answers |= zip(numbers, work.answers(), strict=True)
    return [answers[i] for i in range(len(prompts))]


class _Batch:
    """One batch from prompts to answers.

    Slot s works on prompt `slots[s]`; the first `live` slots are at work. Buffers are indexed by prompt. The taps are
    kept at `place`; None for a cache without.
    """

    def __init__(
        self,
        target: Target,
        prompts: list[np.ndarray],
        cache: SlotCache,
        prefix: Prefix | None,
        max_new_tokens: int,
        place: torch.device | None,
    ) -> None:
        self.target, self.cache, self.prefix, self.max_new = target, cache, prefix, max_new_tokens
        self.lengths = torch.tensor([len(p) for p in prompts])
        self.width = int(self.lengths.max())
        count, room = len(prompts), self.width + max_new_tokens
        self.tokens = torch.zeros((count, room), dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            self.tokens[row, : len(prompt)] = torch.from_numpy(prompt)
        self.topk_ids = torch.zeros((count, max_new_tokens, target.k), dtype=torch.int32)
        self.topk_logprobs = torch.zeros((count, max_new_tokens, target.k))
        # Half precision: every kind of storage keeps fewer bits than this.
        width = len(target.taps) * target.hidden_size
        self.features = None if place is None else torch.zeros((count, room, width), dtype=torch.bfloat16, device=place)
        self.made = torch.zeros(count, dtype=torch.int64)
        self.ended = torch.zeros(count, dtype=torch.bool)
        self.slots, self.live = torch.arange(count), count
        # Prompts stand right-aligned, so that all rows write the same column.
        self.pad = self.width - self.lengths
        self.mask = (torch.arange(room) >= self.pad[:, None]).to(target.device)
        self.stops = torch.tensor(sorted(target.stop_ids), dtype=torch.int64)

    def run(self, sampling: Sampling | None, uniforms: Tensor | None, advance: Callable[[int, float], object]) -> None:
        """Prefill, then one token a step for every live row."""
        last = prefill(self.target, self.cache, self.prefix, self.tokens, self.lengths, self.features)
        column = self.width
        while True:
            following, over = self._choose(last, sampling, uniforms)
            # A document that ends early was more of the work than its tokens.
            unspent = int((self.max_new - self.made[self.slots[: self.live]][over]).sum())
            advance(self.live, (self.live + unspent) / self.max_new)
            if self.features is None:
                following = following[self._leave(over, column)]
            if not self.live:
                return
            last = self._step(following, column)
            column += 1
            if self.features is not None:
                # A finished row leaves one step late, so that its last token's features are kept, too.
                last = last[self._leave(over, column)]
            if not self.live:
                return

    def _choose(
        self, last: Float[Tensor, "live hidden"], sampling: Sampling | None, uniforms: Tensor | None
    ) -> tuple[Int[Tensor, " live"], Bool[Tensor, " live"]]:
        """Each live row's next token, stored with its top-k, and whether it is the row's last."""
        best, logprobs = (t.cpu() for t in self.target.topk(last))
        rows = self.slots[: self.live]
        made = self.made[rows]
        if sampling is None or uniforms is None:
            chosen = best[:, 0]
        else:
            chosen = sampling.choose(best, logprobs, uniforms[rows, made])
        self.topk_ids[rows, made] = best.int()
        self.topk_logprobs[rows, made] = logprobs
        self.tokens[rows, self.lengths[rows] + made] = chosen
        self.made[rows] = made + 1
        self.ended[rows] = torch.isin(chosen, self.stops)
        return chosen, self.ended[rows] | (made + 1 == self.max_new)

    def _step(self, tokens: Int[Tensor, " live"], column: int) -> Float[Tensor, "live hidden"]:
        """Feed one token to every live row; the hidden states it gives."""
        positions = column - self.pad[: self.live]
        first = int(self.pad[: self.live].min())
        self.cache.look(slice(0, self.live), first, column - first)
        device = self.target.device
        step = self.target.forward(
            tokens[:, None].to(device),
            self.mask[: self.live, first : column + 1],
            positions[:, None].to(device),
            cache=self.cache,
            features=self.features is not None,
        )
        if self.features is not None and step.features is not None:
            kept = step.features[:, 0].to(torch.bfloat16).to(self.features.device)
            self.features[self.slots[: self.live], positions] = kept
        return step.hidden[:, 0]

    def _leave(self, over: Bool[Tensor, " live"], columns: int) -> Int[Tensor, " still_live"]:
        """Free the slots of finished rows; the last live rows move into them. Returns where each slot's row was."""
        live = int((~over).sum())
        sources = torch.arange(live)
        holes = over[:live].nonzero()[:, 0]
        movers = live + (~over[live:]).nonzero()[:, 0]
        for hole, mover in zip(holes.tolist(), movers.tolist(), strict=True):
            self.cache.move(mover, hole, slice(int(self.pad[mover]), columns))
        sources[holes] = movers
        for table in (self.slots, self.pad, self.mask):
            table[:live] = table[sources.to(table.device)]
        self.live = live
        return sources

    def answers(self) -> list[Answer]:
        """What was said to each prompt."""
        found = []
        for row, (length, made) in enumerate(zip(self.lengths.tolist(), self.made.tolist(), strict=True)):
            features = None if self.features is None else self.features[row, : length + made].clone()
            found.append(
                Answer(
                    tokens=self.tokens[row, : length + made].numpy().copy(),
                    prompt_tokens=length,
                    topk_ids=self.topk_ids[row, :made].numpy().copy(),
                    topk_logprobs=self.topk_logprobs[row, :made].numpy().copy(),
                    features=features,
                    ended=bool(self.ended[row]),
                )
            )
        return found
