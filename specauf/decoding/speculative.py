"""Speculative decoding of a transformers causal LM with a block drafter."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from specauf.decoding.result import Cycle, DecodeResult
from specauf.decoding.rules import Rule, Sampling, make_rule
from specauf.decoding.stopwatch import Stopwatch
from specauf.drafters.base import Drafter
from specauf.drafters.memory import ContextMemory
from specauf.drafters.proposal import Proposal
from specauf.drafters.vocabulary import TargetVocabulary
from specauf.errors import UserError
from specauf.rotary import frequencies_stay
from specauf.target_forward import cache_argument


def speculative_generate(
    target: Any,
    drafter: Drafter | None,
    input_ids: Int[Tensor, "*one tokens"],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    stop_token_ids: Iterable[int] | Int[Tensor, " _"] | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    sampling: Sampling = "rejection",
    block_size: int | None = None,
    vocabulary: TargetVocabulary | None = None,
    generator: torch.Generator | None = None,
) -> DecodeResult:
    """Decode one prompt; the drafter changes the speed and never the output's law.

    Args:
        target: the causal LM that verifies; the drafter's embedding and head are its own.
        drafter: proposes blocks; None decodes plainly, in the same loop.
        input_ids: the prompt, [tokens] or [1, tokens]; on any device, as the drafter must be on the target's.
        max_new_tokens: length of the answer at most.
        temperature: 0 is greedy, token for token what `generate(do_sample=False)` gives without the processors that a
            generation config may add, such as a repetition penalty.
        stop_token_ids: end the answer, and are its last token; the target's own when None.
        top_k: sample among the k most probable tokens.
        top_p: sample among the most probable tokens that hold this mass.
        sampling: `rejection`, or `greedy-draft`, which drafts the most probable tokens.
        block_size: a shorter block than the drafter was trained with.
        vocabulary: made from the target when None; one with a reduced head drafts those tokens only.
        generator: of the random numbers, on the target's device.

    Raises:
        UserError: the drafter is another target's, or a setting is out of range.
    """
    if not isinstance(input_ids, Tensor):
        raise UserError(f"input_ids: a {type(input_ids).__name__} found, a tensor of ids [tokens] expected")
    prompts = input_ids if input_ids.ndim == 2 else input_ids[None]
    if len(prompts) != 1:
        raise UserError(f"input_ids: {len(prompts)} prompts found, 1 expected; use speculative_generate_batch")
    return speculative_generate_batch(
        target,
        drafter,
        [prompts[0]],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        stop_token_ids=stop_token_ids,
        top_k=top_k,
        top_p=top_p,
        sampling=sampling,
        block_size=block_size,
        vocabulary=vocabulary,
        generator=generator,
    )[0]


def speculative_generate_batch(
    target: Any, drafter: Drafter | None, prompts: Sequence[Int[Tensor, " _"]], *, max_new_tokens: int, **settings: Any
) -> list[DecodeResult]:
    """Decode several prompts together; settings are those of `speculative_generate`. Seconds are the batch's."""
    results = [DecodeResult() for _ in prompts]
    for cycle in speculative_stream(target, drafter, prompts, max_new_tokens=max_new_tokens, **settings):
        results[cycle.prompt].add(cycle)
    return results


def speculative_stream(
    target: Any,
    drafter: Drafter | None,
    prompts: Sequence[Int[Tensor, " _"]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    stop_token_ids: Iterable[int] | Int[Tensor, " _"] | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    sampling: Sampling = "rejection",
    block_size: int | None = None,
    vocabulary: TargetVocabulary | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Cycle]:
    """Committed tokens as they come: first each prompt's first token, then one `Cycle` per prompt and cycle.

    Arguments and errors are those of `speculative_generate`.
    """
    rule = make_rule(temperature, top_k, top_p, sampling, generator)
    slots = 0 if drafter is None else drafter.config.block(block_size) - 1
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens: {max_new_tokens} found, at least 1 expected")
    for p in prompts:
        if not isinstance(p, Tensor) or p.dim() != 1:
            found = list(p.shape) if isinstance(p, Tensor) else type(p).__name__
            raise UserError(f"prompts: one is {found}, tensors of ids [tokens] expected, one for each prompt")
    if len(prompts) < 1 or min(len(p) for p in prompts) < 1:
        raise UserError("input_ids: an empty prompt found, at least one token expected")
    if getattr(target, "_is_stateful", False):  # transformers' flag for what its own assisted decoding refuses
        raise UserError(
            f"target: {type(target).__name__} keeps a state that cannot be rolled back; decode it with a server that "
            "supports it"
        )
    check_target(target.config, [len(p) for p in prompts], max_new_tokens, slots)
    if drafter is not None:
        vocabulary = vocabulary or TargetVocabulary.from_target(target)
        _check_drafter(drafter, target)
        drafter.check(vocabulary, drafter.config.feature_dim)
    stops = frozenset(map(int, _own_stops(target) if stop_token_ids is None else stop_token_ids))
    loop = _Loop(target, drafter, vocabulary, rule, stops, max_new_tokens, slots, len(prompts))
    return loop.run([p.to(target.device) for p in prompts])


class _Loop:
    """The state of prompts decoded together; finished ones leave the batch."""

    def __init__(
        self,
        target: Any,
        drafter: Drafter | None,
        vocabulary: TargetVocabulary | None,
        rule: Rule,
        stops: frozenset[int],
        max_new_tokens: int,
        slots: int,
        prompts: int,
    ) -> None:
        self.target, self.drafter, self.vocabulary, self.rule = target, drafter, vocabulary, rule
        self.stops, self.slots = stops, slots
        self.alive = list(range(prompts))
        self.left = [max_new_tokens] * prompts
        from specauf.decoding.cache import RowCache  # transformers; training's replay does without

        self.cache = RowCache(prompts, target.config.get_text_config().num_hidden_layers)
        self.cache_argument = cache_argument(target)
        self.memory = ContextMemory(prompts)
        self.number = 0

    def run(self, prompts: list[Tensor]) -> Iterator[Cycle]:
        """All cycles until every prompt has its answer."""
        yield from self.prefill(prompts)
        while self.alive:
            yield from self.cycle()

    @torch.inference_mode()
    def prefill(self, prompts: list[Tensor]) -> list[Cycle]:
        """Read the prompts and choose each one's first token."""
        watch = Stopwatch(self.target.device)
        watch.lap()  # nothing is drafted
        counts = [len(p) for p in prompts]
        tokens = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True)
        last = torch.tensor(counts, device=tokens.device) - 1
        keep, where = last.unique(return_inverse=True)
        logits, features = self._read(tokens, keep)
        self.anchors = self.rule.first(logits[torch.arange(len(prompts), device=tokens.device), where])
        watch.lap()
        self._commit(tokens, features, counts)
        first = [[token] for token in self.anchors.tolist()]
        return self._emit(first, [0] * len(first), 0, watch)

    @torch.inference_mode()
    def cycle(self) -> list[Cycle]:
        """Draft a block for every prompt still going, verify, commit."""
        watch = Stopwatch(self.target.device)
        proposal = Proposal(self.anchors.new_zeros(len(self.alive), 0))
        if self.drafter is not None:
            assert self.vocabulary is not None
            proposal = self.drafter.draft(self.memory, self.anchors, self.slots, self.vocabulary, self.rule.choose)
        # The whole block is drafted, as in training; what could not be put out any more is not verified.
        proposal = proposal.first(max(self.left[p] for p in self.alive))
        watch.lap()
        block = torch.cat([self.anchors[:, None], proposal.tokens], 1)
        logits, features = self._read(block, 0)
        watch.lap()
        accepted, self.anchors = self.rule.verify(proposal, logits)
        answer = torch.cat([accepted[:, None], self.anchors[:, None], proposal.tokens], 1).tolist()  # the only wait
        counts = [1 + row[0] for row in answer]
        rows = max(counts)
        self._commit(block[:, :rows], None if features is None else features[:, :rows], counts)
        tokens = [row[2 : 2 + row[0]] + [row[1]] for row in answer]
        self.number += 1
        return self._emit(tokens, [row[0] for row in answer], proposal.tokens.shape[1], watch)

    def _read(self, tokens: Tensor, keep: Tensor | int) -> tuple[Tensor, Tensor | None]:
        """Logits of the next tokens of every prompt, at the positions in `keep` (0: all), and their features."""
        features = self.drafter is not None and self.drafter.needs_features
        together: dict[str, Tensor] = {}
        if len(tokens) > 1:
            together["attention_mask"] = self.cache.mask(tokens.shape[1], tokens.device, self.target.dtype)
            positions = self.cache.positions(tokens.shape[1], tokens.device)
            # Behind an answer's end nothing is read, and there learned positions may have no row.
            ends = [length + self.left[p] for length, p in zip(self.cache.lengths, self.alive, strict=True)]
            if max(self.cache.lengths):
                positions = positions.minimum(torch.tensor(ends, device=tokens.device)[:, None])
            together["position_ids"] = positions
        out = self.target(
            tokens,
            use_cache=True,
            output_hidden_states=features,
            logits_to_keep=keep,
            return_dict=True,
            **together,
            **{self.cache_argument: self.cache},
        )
        if not features:
            return out.logits, None
        assert self.drafter is not None
        return out.logits, torch.cat([out.hidden_states[tap + 1] for tap in self.drafter.config.taps], -1)

    def _commit(self, tokens: Tensor, features: Tensor | None, counts: list[int]) -> None:
        self.cache.commit(counts)
        if self.drafter is not None:
            assert self.vocabulary is not None
            self.drafter.remember(self.memory, tokens, features, counts, self.vocabulary)

    def _emit(self, tokens: list[list[int]], accepted: list[int], drafted: int, watch: Stopwatch) -> list[Cycle]:
        """Cut each prompt's tokens at its end, drop finished prompts, and report."""
        cycles, going = [], []
        for row, prompt in enumerate(self.alive):
            out = tokens[row][: self.left[prompt]]
            stop = next((i for i, token in enumerate(out) if token in self.stops), None)
            out = out if stop is None else out[: stop + 1]
            self.left[prompt] = 0 if stop is not None else self.left[prompt] - len(out)
            if self.left[prompt]:
                going.append(row)
            cycles.append((prompt, out, min(accepted[row], len(out))))
        if len(going) < len(self.alive):
            self.alive = [self.alive[row] for row in going]
            self.anchors = self.anchors[going]
            self.cache.keep(going)
            self.memory.keep(going)
        (draft, verify), other = watch.read()
        return [Cycle(out, a, drafted, p, self.number, draft, verify, other) for p, out, a in cycles]


def _own_stops(target: Any) -> Sequence[int]:
    eos = target.generation_config.eos_token_id
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)


def _check_drafter(drafter: Drafter, target: Any) -> None:
    depth = target.config.get_text_config().num_hidden_layers
    if drafter.config.num_target_layers != depth:
        raise UserError(
            f"num_target_layers: {drafter.config.num_target_layers} in the drafter, {depth} in the target; "
            "it was trained for another target"
        )
    if drafter.norm.weight.device != target.device:
        raise UserError(f"drafter: on {drafter.norm.weight.device}, the target on {target.device}; move it there first")
    if drafter.needs_features and drafter.config.feature_dim != drafter.config.raw_feature_dim:
        raise UserError(
            f"features: the drafter's fc reads a sketch of {drafter.config.feature_dim} numbers, the target gives "
            f"{drafter.config.raw_feature_dim}; fold the cache's sketch into it first"
        )


def check_target(config: Any, lengths: list[int], max_new_tokens: int, slots: int) -> None:
    """Refuse targets that would not say what plain decoding says.

    Args:
        config: the target's.
        lengths: tokens of the prompts that are decoded together.
        max_new_tokens: of the longest answer.
        slots: of the block behind it.

    Raises:
        UserError: the target's state cannot go back to an earlier token, it has too few positions, its rotary
            frequencies change on the way, or it cannot read several prompts of different lengths.
    """
    text = config.get_text_config()
    prompts, longest = len(lengths), max(lengths) + max_new_tokens + slots
    rotates = getattr(text, "rope_parameters", None) or getattr(text, "rope_theta", None)
    table = None if rotates else getattr(text, "max_position_embeddings", None)
    if table and max(lengths) + max_new_tokens > table:
        raise UserError(
            f"max_new_tokens: {max_new_tokens} behind a prompt of {max(lengths)} tokens, the target has {table} "
            "positions: give shorter prompts or a smaller max_new_tokens"
        )
    # Older families give a window to all layers, without layer_types.
    reached = (getattr(text, "sliding_window", None) or longest) < longest
    kinds = set(getattr(text, "layer_types", None) or ["sliding_attention" if reached else "full_attention"])
    recurrent = kinds - {"full_attention", "sliding_attention", "chunked_attention"}
    if recurrent:
        raise UserError(
            f"layer_types: {', '.join(sorted(recurrent))} in the target keep a state that cannot be rolled back; "
            "decode this target with a server that supports it"
        )
    rope, original = frequencies_stay(text) or ("", longest)
    # A prompt beyond the trained length has LongRoPE's long factors from the first pass on; dynamic ones grow with it.
    if original < longest and (rope == "dynamic" or min(lengths) <= original):
        raise UserError(
            f"rope_type: {rope} changes its frequencies beyond {original} tokens; prompt, answer and "
            f"block have {longest}: give shorter prompts or a smaller max_new_tokens"
        )
    if prompts == 1:
        return
    if "local" in (getattr(text, "attention_layers", None) or ()):  # GPT-Neo
        kinds = {"local"}
    if getattr(text, "alibi", False) or text.model_type == "bloom":
        raise UserError(
            f"prompts: {prompts} found, 1 expected for a target with ALiBi positions; decode one prompt at a time"
        )
    if kinds != {"full_attention"}:
        raise UserError(
            f"prompts: {prompts} found, 1 expected for a target with sliding-window layers; decode one prompt at a time"
        )
    kernel = getattr(config, "_attn_implementation", "sdpa")
    if kernel not in ("sdpa", "eager"):
        raise UserError(
            f"prompts: {prompts} found, 1 expected for a target with attention {kernel}; decode one prompt at a time, "
            "or load it with attn_implementation='sdpa'"
        )
