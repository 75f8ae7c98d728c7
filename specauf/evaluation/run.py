"""Decode benchmarks with every drafter and without, interleaved prompt by prompt, and keep what happened."""

import datetime
import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from specauf.decoding import DecodeResult, speculative_generate
from specauf.decoding.speculative import check_target
from specauf.drafters import Drafter, TargetVocabulary
from specauf.errors import UserError
from specauf.evaluation.benchmarks import Prompt
from specauf.evaluation.divergence import divergence
from specauf.evaluation.environment import environment
from specauf.evaluation.settings import Setting
from specauf.progress import progress
from specauf.template_dates import asks_date, dated_template, plain_template

Row = dict[str, Any]
PLAIN = "plain"
ROWS = 3  # raised when the same command gives other rows than the release before


def evaluate_prompts(
    target: Any,
    tokenizer: Any,
    drafters: Mapping[str, Drafter],
    benchmarks: Mapping[str, Sequence[Prompt]],
    settings: Sequence[Setting],
    *,
    rows_file: Path,
    identity: Mapping[str, Any],
    template_options: Mapping[str, Any] | None = None,
) -> list[Row]:
    """One row a prompt and setting: tokens and seconds of plain decoding, of `generate`, and of every drafter.

    Each finished row is appended to `rows_file`, so an interrupted evaluation goes on at the first missing one.
    Rows of other drafter weights, another target or other prompt tokens are refused, and those measured on another
    device or release.

    Args:
        target: the causal LM that verifies.
        tokenizer: its tokenizer, with a chat template.
        drafters: by the name they are reported under.
        benchmarks: prompts by the name of their benchmark.
        settings: ways of decoding.
        rows_file: JSONL of finished rows.
        identity: what else identifies this evaluation.
        template_options: of the chat template, as the cache was built with them.

    Returns:
        Rows in the order of benchmarks, settings and prompts.
    """
    options = dict(template_options or {})
    key = _key(drafters, {**identity, "template_options": options})
    place = environment(target.device)
    rows = _finished(rows_file, key, place)
    finished = {_place(row): row for row in rows}
    # A template may print the date: that on which the first row was measured stands in all prompts.
    layout = _on_day((rows[0]["environment"] if rows else place)["date"], tokenizer, options)
    ids = {p: encode(tokenizer, p.text, layout) for prompts in benchmarks.values() for p in prompts}
    todo = [(name, s, p) for name, prompts in benchmarks.items() for s in settings for p in prompts]
    wanted = [(name, json.dumps(s.to_dict()), p.task_id, p.digest) for name, s, p in todo]
    for (_, _, prompt), where in zip(todo, wanted, strict=True):
        if where in finished and finished[where].get("ids") != _ids_digest(ids[prompt]):
            raise UserError(
                f"prompt {prompt.task_id}: other tokens in {rows_file} than the tokenizer and its chat template give "
                "now: delete the file, or give another --out"
            )
    missing = [item for item, place in zip(todo, wanted, strict=True) if place not in finished]
    slots = max((drafter.config.slots for drafter in drafters.values()), default=0)
    for _, setting, prompt in missing:  # before hours of decoding, and before `generate` meets it
        check_target(target.config, [ids[prompt].shape[1]], setting.max_new_tokens, slots)
    if missing:
        _warm_up(target, ids[missing[0][2]], drafters, min(4, missing[0][1].max_new_tokens))
    vocabulary = TargetVocabulary.from_target(target) if drafters else None
    done = len(todo) - len(missing)
    with progress("decoding", len(todo), unit="prompts", initial=done) as advance, rows_file.open("a") as out:
        for name, setting, prompt in missing:
            row = {"key": key, "environment": place, "benchmark": name, "setting": setting.to_dict()}
            row |= decode_prompt(target, ids[prompt], drafters, prompt, setting, vocabulary)
            out.write(json.dumps(row) + "\n")
            out.flush()
            finished[_place(row)] = row
            advance(1)
    return [finished[place] for place in wanted]


def _on_day(day: str, tokenizer: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Options of a template that prints this day, where it would print today's."""
    template = plain_template(tokenizer, options)
    if not asks_date(template):
        return options
    return options | {"chat_template": dated_template(template, datetime.date.fromisoformat(day))}


def encode(tokenizer: Any, text: str, template_options: Mapping[str, Any] | None = None) -> torch.Tensor:
    """A user turn as the target's chat template lays it out, ready for the answer; the bare text without a template.

    Args:
        tokenizer: the target's.
        text: the turn.
        template_options: keyword arguments of the template, such as `enable_thinking`.

    Returns:
        Token ids [1, tokens].

    Raises:
        UserError: the template cannot be read, or raises.
    """
    options = dict(template_options or {})
    if not plain_template(tokenizer, options):
        ids: torch.Tensor = tokenizer(text, return_tensors="pt")["input_ids"]
        return ids
    from jinja2 import TemplateError

    turns = [{"role": "user", "content": text}]
    try:
        return tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True, **options
        )["input_ids"]
    except TemplateError as error:
        raise UserError(
            f"the target's chat template refuses a prompt ({error}): give other prompts, or mend it"
        ) from error


def decode_prompt(
    target: Any,
    ids: torch.Tensor,
    drafters: Mapping[str, Drafter],
    prompt: Prompt,
    setting: Setting,
    vocabulary: TargetVocabulary | None = None,
) -> Row:
    """Decode one prompt, of the tokens `ids`, in every way; the order is generate, plain, then each drafter."""
    ids, seed = ids.to(target.device), _seed(setting, prompt)

    def decode(drafter: Drafter | None) -> DecodeResult:
        return speculative_generate(
            target,
            drafter,
            ids,
            max_new_tokens=setting.max_new_tokens,
            temperature=setting.temperature,
            top_k=setting.top_k,
            top_p=setting.top_p,
            sampling=setting.sampling,
            block_size=None if drafter is None else setting.block_size,
            vocabulary=vocabulary,
            generator=torch.Generator(target.device).manual_seed(seed),
        )

    expected, seconds = _generate(target, ids, setting, seed)
    row: Row = {
        "task_id": prompt.task_id,
        "digest": prompt.digest,
        "ids": _ids_digest(ids),
        "prompt_tokens": ids.shape[1],
        "generate": {"tokens": len(expected), "seconds": seconds},
        "plain": {},
        "drafters": {},
    }
    for name, drafter in ((PLAIN, None), *drafters.items()):
        result = decode(drafter)
        part: Row = {
            "tokens": len(result.tokens),
            "seconds": result.seconds,
            "prefill_seconds": result.prefill_seconds,
            "verify_seconds": result.verify_seconds,
            "other_seconds": result.other_seconds,
        }
        if setting.greedy:
            part["divergence"] = divergence(target, ids, result.tokens, expected)
            part["identical"] = part["divergence"] is None
        if drafter is None:
            row["plain"] = part
            continue
        row["drafters"][name] = part | {
            "accepted": list(result.accepted),
            "drafted": list(result.drafted),
            "draft_seconds": result.draft_seconds,
        }
    return row


PROCESSORS = (
    "repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "min_length",
    "min_new_tokens", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id",
    "sequence_bias", "exponential_decay_length_penalty", "guidance_scale", "watermarking_config", "min_p", "typical_p",
    "epsilon_cutoff", "eta_cutoff", "num_beams",
)  # fmt: skip


def without_processors(target: Any) -> list[str]:
    """Leave of the target's generation config what ends an answer, and name what else it asked for.

    Speculative decoding verifies against the target's own distribution: a repetition penalty or the like, which
    `generate` would apply by that config, has no part in it, nor in the answers a cache holds.
    """
    own = target.generation_config
    neutral = GenerationConfig(eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id)
    target.generation_config = neutral
    return [f"{name} {getattr(own, name)}" for name in PROCESSORS if getattr(own, name, None) != getattr(neutral, name)]


def _seed(setting: Setting, prompt: Prompt) -> int:
    """Of a prompt's random numbers: other prompts draw others, as the bootstrap over prompts takes for granted.

    All drafters draw the same, so that comparing them in pairs takes out what chance they share.
    """
    text = f"{setting.seed} {prompt.task_id} {prompt.digest}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def _generate(target: Any, ids: torch.Tensor, setting: Setting, seed: int) -> tuple[list[int], float]:
    """The answer of transformers' own generation, and its seconds."""
    options: dict[str, Any] = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    if not setting.greedy:
        torch.manual_seed(seed)
        options = {"do_sample": True, "temperature": setting.temperature}
        options |= {"top_k": setting.top_k or 0, "top_p": setting.top_p or 1.0}
    started = time.perf_counter()
    answer = target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=setting.max_new_tokens, **options)
    tokens = answer[0, ids.shape[1] :].tolist()  # waits for a GPU
    return tokens, time.perf_counter() - started


def _warm_up(target: Any, ids: torch.Tensor, drafters: Mapping[str, Drafter], tokens: int) -> None:
    """The first calls of a process pay for allocation; keep that out of the first prompt's seconds."""
    for drafter in (None, *drafters.values()):
        speculative_generate(target, drafter, ids, max_new_tokens=tokens)


def _key(drafters: Mapping[str, Drafter], identity: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps({**identity, "rows": ROWS}, sort_keys=True).encode())
    for name, drafter in sorted(drafters.items()):
        digest.update(name.encode())
        digest.update(json.dumps(drafter.config.to_dict(), sort_keys=True).encode())
        for parameter in drafter.state_dict().values():
            digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _ids_digest(ids: torch.Tensor) -> str:
    """Tells prompts apart that have one text, and another layout around it."""
    return hashlib.sha256(json.dumps(ids.tolist()).encode()).hexdigest()[:8]


def _place(row: Row) -> tuple[str, str, str, str]:
    return row["benchmark"], json.dumps(row["setting"]), row["task_id"], row["digest"]


def _is_row(row: Any, place: Mapping[str, Any]) -> bool:
    fields = {"key", "environment", "benchmark", "setting", "task_id", "digest"}
    measured = row.get("environment") if isinstance(row, dict) and fields <= row.keys() else None
    return isinstance(measured, dict) and place.keys() <= measured.keys()


def _finished(rows_file: Path, key: str, place: Mapping[str, Any]) -> list[Row]:
    if not rows_file.exists():
        return []
    whole, _, half = rows_file.read_bytes().rpartition(b"\n")
    rows: list[Row] = []
    for line in whole.splitlines():
        where = f"{rows_file} line {len(rows) + 1}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where} is not JSON: delete the file or that line") from error
        if not _is_row(row, place):
            raise UserError(f"{where} is no row of `specauf evaluate`: delete that line, or give another --out")
        if row["key"] != key:
            raise UserError(
                f"{where} holds results of another target, other drafters or another release ({row['key']}, "
                f"now {key}): delete the file, or give another --out"
            )
        for field in (f for f in place if f != "date" and row["environment"][f] != place[f]):
            raise UserError(
                f"{field}: {row['environment'][field]} in {where}, {place[field]} now; times of one evaluation are "
                "measured alike: go on there, delete the file or give another --out"
            )
        rows.append(row)
    if half:  # of a killed run; only now, for a file that is refused stays as it is
        os.truncate(rows_file, len(whole) + 1 if rows else 0)
    return rows
