"""What the servers need of the fields that drafters other than DFlash add to config.json."""

from collections.abc import Iterator
from typing import Any

from specauf.drafters import DFlash2Config, DrafterConfig, DSparkConfig
from specauf.drafters.kind_of_config import zlab_kind
from specauf.drafters.markov import MARKOV_HEADS
from specauf.export.problem import MISSING, Problem


def kind_of(raw: dict[str, Any]) -> type[DrafterConfig]:
    """The kind of a config; DFlash's for all others, whose code runs Domino too."""
    kinds: dict[str, type[DrafterConfig]] = {kind.kind: kind for kind in (DFlash2Config, DSparkConfig)}
    return kinds.get(zlab_kind(raw), DrafterConfig)


def domino(inner: dict[str, Any]) -> Iterator[Problem]:
    """Fields of Domino's head, which SGLang reads."""
    expected = {"projector_type": "domino", "shift_label": False, "pure_draft_prefix_len": 1}
    for name, value in expected.items():
        found = inner.get(name)
        if type(found) is not type(value) or found != value:
            why = "SGLang refuses it, or drafts other tokens than were trained"
            yield Problem(f"dflash_config.{name}", MISSING if found is None else found, value, why)
    for name in ("gru_hidden_dim", "emb_dim"):
        if type(inner.get(name)) is not int or inner[name] < 1:
            yield Problem(f"dflash_config.{name}", inner.get(name, MISSING), "a number", "SGLang refuses it")


def dspark(own: dict[str, Any], prefix: str) -> Iterator[Problem]:
    """Fields of DSpark's heads, in one place where they lie."""
    why = "servers read it there, and refuse the drafter or draft other tokens than were trained"
    rank, kind = own.get("markov_rank"), own.get("markov_head_type")
    if type(rank) is not int or rank < 1:
        yield Problem(f"{prefix}markov_rank", MISSING if rank is None else rank, "a number", why)
    if kind not in MARKOV_HEADS:
        yield Problem(f"{prefix}markov_head_type", kind or MISSING, " or ".join(MARKOV_HEADS), why)
    confident = own.get("enable_confidence_head")
    if type(confident) is not bool:
        found = MISSING if confident is None else confident
        yield Problem(f"{prefix}enable_confidence_head", found, "true or false", why)
    elif confident and own.get("confidence_head_with_markov") is not True:
        found = own.get("confidence_head_with_markov", MISSING)
        why = "servers would build a head of another shape"
        yield Problem(f"{prefix}confidence_head_with_markov", found, True, why)


def first_slot(raw: dict[str, Any], default: bool | None) -> Iterator[Problem]:
    """Where DSpark's slots begin; `default` where the config does not say, None where readers differ in it."""
    if type(raw.get("sample_from_anchor", default)) is not bool:
        why = "it decides which token a slot predicts"
        yield Problem("sample_from_anchor", raw.get("sample_from_anchor", MISSING), "true or false", why)


def dflash2(own: dict[str, Any], body: dict[str, Any], block: Any, prefix: str) -> Iterator[Problem]:
    """Fields of DFlash 2's convolutions and selector."""
    for name in DFlash2Config.own:
        if type(own.get(name)) is not int or own[name] < 1:
            why = "servers read it there, and refuse the drafter or run it as DFlash"
            yield Problem(prefix + name, own.get(name, MISSING), "a number", why)
    hidden, group, k = body.get("hidden_size"), own.get("conv_group_size"), own.get("selector_top_k")
    if isinstance(hidden, int) and isinstance(group, int) and group > 0 and hidden % group:
        yield Problem(prefix + "conv_group_size", group, f"a divisor of {hidden}", "servers refuse it")
    limits = {"conv_kernel_size": ("block_size", block), "selector_top_k": ("vocab_size", body.get("vocab_size"))}
    for name, (what, limit) in limits.items():
        if isinstance(limit, int) and isinstance(own.get(name), int) and own[name] > limit:
            yield Problem(prefix + name, own[name], f"at most {what} {limit}", "readers refuse it")
    if prefix and isinstance(hidden, int) and isinstance(k, int) and hidden < k * (k + 1):
        why = f"llama.cpp, which reads this layout alone, writes all pairs of candidates into a row of {hidden} numbers"
        yield Problem(prefix + "selector_top_k", k, f"k * (k + 1) of at most {hidden}", why)
