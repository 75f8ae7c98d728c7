"""What training spends on slots that inference never reaches, and where drafts fail: figures without the target."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor

from specauf.evaluation.audit_blocks import Blocks, Observed
from specauf.evaluation.summary import bootstrap_tau, tau_per_prompt, tau_pooled
from specauf.objectives import accept_until_fail, exponential_decay


def support(blocks: Blocks, gamma: int | float) -> dict[str, Any]:
    """How much of each weighting's signal lies behind the first wrong draft.

    Args:
        blocks: at training's anchors.
        gamma: of the decay w[k] = exp(-(k-1)/gamma).

    Returns:
        `support_ratio` (share of valid slots that AUF keeps) and, for uniform, decay and auf: `wasted_weight` and
        `wasted_loss`, the shares of weight and of weighted cross-entropy on slots that inference does not reach, and
        `weight_by_slot`, the share of all weight in each slot.
    """
    keep = accept_until_fail(blocks.correct, blocks.valid)
    weights = {
        "uniform": blocks.valid.double(),
        "decay": exponential_decay(blocks.valid, gamma).double(),
        "auf": keep.double(),
    }
    record: dict[str, Any] = {"support_ratio": _share(keep.double(), blocks.valid.double()), "gamma": gamma}
    for name, weight in weights.items():
        loss = weight * blocks.loss
        wasted = keep == 0
        record[name] = {
            "wasted_weight": _share(weight * wasted, weight),
            "wasted_loss": _share(loss * wasted, loss),
            "weight_by_slot": (weight.sum(0) / weight.sum()).tolist(),
        }
    return record


def _share(part: Tensor, whole: Tensor) -> float:
    return float(part.sum() / whole.sum())


def by_slot(blocks: Blocks) -> dict[str, list[float | None]]:
    """Acceptance of each slot.

    Returns:
        `survival`: share of blocks that accept slot k, of those where it lies in the answer. `conditional`: of those
        that reach it. `accuracy`: share of right drafts, reached or not: what token accuracy counts.
    """
    valid, reached, correct = (x.double().sum(0) for x in (blocks.valid, blocks.reached, blocks.correct))
    kept = (blocks.reached & blocks.correct).double().sum(0)

    def rates(part: Tensor, whole: Tensor) -> list[float | None]:
        return [p / w if w else None for p, w in zip(part.tolist(), whole.tolist(), strict=True)]

    return {"survival": rates(kept, valid), "conditional": rates(kept, reached), "accuracy": rates(correct, valid)}


def calibration(confidence: Float[Tensor, " slots"], correct: Bool[Tensor, " slots"], bins: int = 10) -> dict[str, Any]:
    """Expected calibration error: mean over slots of |accuracy - confidence| of their bin (Guo et al., 1706.04599).

    Args:
        confidence: the drafter's probability of its draft.
        correct: whether the draft was right.
        bins: of equal width.
    """
    number = (confidence * bins).long().clamp(max=bins - 1)
    table, error = [], 0.0
    for b in range(bins):
        inside = number == b
        if count := int(inside.sum()):
            mean, right = float(confidence[inside].mean()), float(correct[inside].double().mean())
            error += count / len(confidence) * abs(right - mean)
            table.append({"slots": count, "confidence": mean, "accuracy": right})
    squares = (confidence.double() - correct.double()).square()
    return {"ece": error, "brier": float(squares.mean()), "bins": table}


def token_kind(text: str) -> str:
    """Coarse kind of a token from its text."""
    if not text.strip():
        return "newline" if "\n" in text else "space"
    core = text.strip()
    if core.isdigit():
        return "number"
    if core.replace("_", "a").isalnum():
        return "word start" if text[0].isspace() else "word piece"
    return "punctuation"


def by_kind(blocks: Blocks, kind: Callable[[int], str]) -> dict[str, dict[str, Any]]:
    """For each kind of cached token among the slots that decoding reaches: how many, and how many are accepted.

    Args:
        blocks: at decoding's anchors.
        kind: of a token id.
    """
    reached = blocks.reached
    seen, kept, ends = Counter[str](), Counter[str](), 0
    for token, right in zip(blocks.labels[reached].tolist(), blocks.correct[reached].tolist(), strict=True):
        seen[kind(token)] += 1
        kept[kind(token)] += right
        ends += not right
    return {
        name: {
            "reached": count,
            "acceptance": kept[name] / count,
            "share_of_ends": (count - kept[name]) / ends if ends else 0.0,
        }
        for name, count in seen.most_common()
    }


def block_ends(blocks: Blocks, text: Callable[[int], str], count: int = 15) -> list[dict[str, Any]]:
    """The cached tokens that end most blocks, with how often they are right and what is drafted instead.

    Args:
        blocks: at decoding's anchors.
        text: of a token id.
        count: tokens to list.
    """
    reached = blocks.reached
    wrong = reached & ~blocks.correct
    ends = Counter(blocks.labels[wrong].tolist())
    seen = Counter(blocks.labels[reached].tolist())
    instead: dict[int, Counter[int]] = {}
    for label, drafted in zip(blocks.labels[wrong].tolist(), blocks.drafted[wrong].tolist(), strict=True):
        instead.setdefault(label, Counter())[drafted] += 1
    total = max(1, int(wrong.sum()))
    return [
        {
            "token": token,
            "text": text(token),
            "ends": n,
            "share_of_ends": n / total,
            "acceptance": 1 - n / seen[token],
            "drafted_instead": text(instead[token].most_common(1)[0][0]),
        }
        for token, n in ends.most_common(count)
    ]


def audit_record(
    observed: Observed,
    *,
    gamma: int | float,
    text: Callable[[int], str],
    greedy: bool,
    evaluation: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Everything in one record.

    Args:
        observed: both views of the documents.
        gamma: of the decay it is compared with.
        text: of a token id.
        greedy: the cached answers are the target's own greedy ones, so replay is real decoding but for the rounding of
            stored features.
        evaluation: figures of this drafter in real decoding (a run of an evaluation record, and the `block_size` it
            decoded in), if there are any.
    """
    training, decoding = observed.training, observed.decoding
    reached = decoding.reached
    correct = decoding.correct[reached]
    tau = {
        "replay": tau_pooled(observed.accepted),
        "replay_95": bootstrap_tau(observed.accepted),
        "replay_per_document": tau_per_prompt(observed.accepted),
        "answers_are_greedy": greedy,
        "at_random_anchors": float(training.accepted.double().mean()) + 1,
        "evaluated": evaluation["tau_pooled"] if evaluation else None,
        "evaluated_95": evaluation["tau_pooled_95"] if evaluation else None,
        "evaluated_block": evaluation["block_size"] if evaluation else None,
        "replay_as_evaluated": tau_pooled(observed.as_evaluated) if evaluation else None,
    }
    return {
        "documents": len(observed.accepted),
        "cycles": sum(len(a) for a in observed.accepted),
        "training_blocks": len(training.labels),
        "tau": tau,
        "support": support(training, gamma),
        "by_slot": {"training_anchors": by_slot(training), "decoding_anchors": _without_accuracy(by_slot(decoding))},
        "by_token_kind": by_kind(decoding, lambda token: token_kind(text(token))),
        "calibration": {
            "reached": calibration(decoding.confidence[reached], correct),
            "stated": None if bool(decoding.stated.isnan().all()) else calibration(decoding.stated[reached], correct),
            "all_valid": calibration(training.confidence[training.valid], training.correct[training.valid]),
        },
        "block_ends": block_ends(decoding, text),
    }


def _without_accuracy(slots: dict[str, list[float | None]]) -> dict[str, list[float | None]]:
    """At decoding's anchors nothing was computed behind the first wrong draft."""
    return {name: values for name, values in slots.items() if name != "accuracy"}
