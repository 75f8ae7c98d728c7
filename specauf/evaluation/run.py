"""Decode a benchmark with every drafter and without, interleaved prompt by prompt, and keep what happened."""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from specauf.decoding import DecodeResult, speculative_generate
from specauf.drafters import Drafter
from specauf.errors import UserError
from specauf.evaluation.benchmarks import Prompt
from specauf.progress import progress


def evaluate_prompts(
    target: Any,
    tokenizer: Any,
    drafters: Mapping[str, Drafter],
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    rows_file: Path,
    settings: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """One row a prompt: tokens and seconds of plain decoding, of `generate`, and of every drafter.

    Each finished prompt is appended to `rows_file`, so an interrupted evaluation goes on at the first missing prompt.
    Rows of other settings or other drafter weights are refused.

    Args:
        target: the causal LM that verifies.
        tokenizer: its tokenizer, with a chat template.
        drafters: by the name they are reported under.
        prompts: what to answer.
        max_new_tokens: length of an answer.
        rows_file: JSONL of finished prompts.
        settings: what else identifies this evaluation.
    """
    key = _key(drafters, max_new_tokens, settings)
    rows = _finished(rows_file, key)[: len(prompts)]
    _warm_up(target, tokenizer, drafters, prompts[0])
    with progress("decoding", len(prompts), unit="prompts", initial=len(rows)) as advance, rows_file.open("a") as out:
        for prompt in prompts[len(rows) :]:
            rows.append({"key": key} | _decode_prompt(target, tokenizer, drafters, prompt, max_new_tokens))
            out.write(json.dumps(rows[-1]) + "\n")
            out.flush()
            advance(1)
    return rows


def encode(tokenizer: Any, text: str) -> torch.Tensor:
    """A user turn as the target's chat template lays it out, ready for the answer: [1, tokens]."""
    turns = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
        "input_ids"
    ]


def stop_tokens(target: Any) -> list[int]:
    """Token ids that end an answer of this target."""
    eos = target.generation_config.eos_token_id
    return eos if isinstance(eos, list) else [eos]


def _decode_prompt(
    target: Any, tokenizer: Any, drafters: Mapping[str, Drafter], prompt: Prompt, max_new_tokens: int
) -> dict[str, Any]:
    ids = encode(tokenizer, prompt.text)
    stops = stop_tokens(target)

    def decode(drafter: Drafter | None) -> DecodeResult:
        return speculative_generate(target, drafter, ids, max_new_tokens=max_new_tokens, stop_token_ids=stops)

    started = time.perf_counter()
    reference = target.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False
    )
    seconds = time.perf_counter() - started
    expected = reference[0, ids.shape[1] :].tolist()
    plain = decode(None)
    row: dict[str, Any] = {
        "task_id": prompt.task_id,
        "prompt_tokens": ids.shape[1],
        "tokens": len(expected),
        "generate": {"seconds": seconds},
        "plain": {"seconds": plain.seconds, "identical": list(plain.tokens) == expected},
        "drafters": {},
    }
    for name, drafter in drafters.items():
        result = decode(drafter)
        row["drafters"][name] = {
            "accepted": list(result.accepted),
            "seconds": result.seconds,
            "draft_seconds": result.draft_seconds,
            "verify_seconds": result.verify_seconds,
            "identical": list(result.tokens) == expected,
        }
    return row


def _warm_up(target: Any, tokenizer: Any, drafters: Mapping[str, Drafter], prompt: Prompt) -> None:
    """The first calls of a process pay for allocation; keep that out of the first prompt's seconds."""
    ids = encode(tokenizer, prompt.text)
    for drafter in (None, *drafters.values()):
        speculative_generate(target, drafter, ids, max_new_tokens=4)


def _key(drafters: Mapping[str, Drafter], max_new_tokens: int, settings: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps([dict(settings), max_new_tokens], sort_keys=True).encode())
    for name, drafter in sorted(drafters.items()):
        digest.update(name.encode())
        for parameter in drafter.state_dict().values():
            digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _finished(rows_file: Path, key: str) -> list[dict[str, Any]]:
    if not rows_file.exists():
        return []
    rows = [json.loads(line) for line in rows_file.read_text().splitlines() if line.endswith("}")]
    rows_file.write_text("".join(json.dumps(row) + "\n" for row in rows))  # a killed run can leave half a line
    if rows and rows[0]["key"] != key:
        raise UserError(
            f"{rows_file} holds results of other drafters or settings ({rows[0]['key']}, now {key}): "
            "delete it or write elsewhere with --out"
        )
    return rows
