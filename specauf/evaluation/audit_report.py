"""The audit as a Markdown page; reads its JSON only."""

from collections.abc import Mapping
from typing import Any

from specauf.evaluation.report import table


def markdown(record: Mapping[str, Any]) -> str:
    """The page.

    Args:
        record: of `audit_record`, with `drafter` and `cache`.
    """
    tau, support = record["tau"], record["support"]
    low, high = tau["replay_95"]
    slots = record["by_slot"]["decoding_anchors"]
    lines = [
        f"# Audit of {record['drafter']}",
        "",
        f"Cache {record['cache']}, split {record['split']}: {record['documents']} documents, "
        f"{record['cycles']} cycles, {record['training_blocks']} training blocks. No target was loaded.",
        "",
        "## Emitted length",
        "",
        f"- Replay of the cached answers: {tau['replay']:.3f} ({low:.3f} to {high:.3f}), "
        + (
            "which is real decoding, but for how features are stored "
            f"({record['features']}): the target wrote them greedily."
            if tau["answers_are_greedy"]
            else "an estimate: the target did not write them greedily."
        ),
        f"- At training's random anchors: {tau['at_random_anchors']:.3f}.",
    ]
    if tau["evaluated"] is None:
        lines.append("- Real decoding: not given (--evaluation).")
    else:
        a, b = tau["evaluated_95"]
        lines.append(
            f"- Real decoding in blocks of {tau['evaluated_block']}: {tau['evaluated']:.3f} ({a:.3f} to {b:.3f}), "
            f"{tau['evaluated'] / tau['replay_as_evaluated'] - 1:+.1%} against replay in such blocks "
            "(on other prompts)."
        )
    lines += ["", "## Training signal behind the first wrong draft", ""]
    lines += [
        "| weighting | weight that inference never reaches | loss that inference never reaches |",
        "|---|---|---|",
        *(
            f"| {name} | {support[name]['wasted_weight']:.1%} | {support[name]['wasted_loss']:.1%} |"
            for name in ("uniform", "decay", "auf")
        ),
        "",
        f"AUF would keep {support['support_ratio']:.1%} of the valid slots. Share of the weight by slot:",
        "",
    ]
    count = len(support["auf"]["weight_by_slot"])
    header = ["slot", *map(str, range(1, count + 1))]
    lines += table(header, [[n, *_percent(support[n]["weight_by_slot"])] for n in ("uniform", "decay", "auf")])
    lines += ["", "## Acceptance by slot, at the anchors decoding visits", ""]
    lines += table(header, [[name, *_percent(values)] for name, values in slots.items()])
    accuracy = record["by_slot"]["training_anchors"]["accuracy"]
    lines += table(header, [["accuracy", *_percent(accuracy)]])[2:]
    lines += [
        "",
        "`survival`: accepted, of all. `conditional`: accepted, of those reached. `accuracy`: right, reached or",
    ]
    lines += ["not, at training's random anchors: what training logs count."]
    lines += ["", "## Acceptance by kind of token", ""]
    lines += table(
        ["kind", "reached", "acceptance", "share of block ends"],
        [
            [name, f"{row['reached']:,}", f"{row['acceptance']:.1%}", f"{row['share_of_ends']:.1%}"]
            for name, row in record["by_token_kind"].items()
        ],
    )
    lines += ["", "## Tokens that end blocks", ""]
    lines += table(
        ["token", "blocks ended", "share of ends", "acceptance", "most drafted instead"],
        [
            [
                _quoted(row["text"]),
                f"{row['ends']:,}",
                f"{row['share_of_ends']:.1%}",
                f"{row['acceptance']:.1%}",
                _quoted(row["drafted_instead"]),
            ]
            for row in record["block_ends"]
        ],
    )
    reached, valid, stated = (record["calibration"].get(k) for k in ("reached", "all_valid", "stated"))
    lines += [
        "",
        "## Calibration of the drafter's confidence",
        "",
        f"Expected calibration error {reached['ece']:.3f} over the slots decoding reaches, {valid['ece']:.3f} over all "
        "valid slots at training's anchors.",
        "",
        *_bins(reached),
    ]
    if stated is not None:
        lines += [
            "",
            "## Calibration of its confidence head",
            "",
            f"Expected calibration error {stated['ece']:.3f} over the slots decoding reaches, Brier score "
            f"{stated['brier']:.3f}; of its probabilities themselves, above, {reached['brier']:.3f}. Compared with "
            "greedy decoding: a loss that reads top-k teaches the chance under sampling instead.",
            "",
            *_bins(stated),
        ]
    return "\n".join([*lines, ""])


def _bins(calibration: Mapping[str, Any]) -> list[str]:
    rows = [[f"{b['slots']:,}", f"{b['confidence']:.3f}", f"{b['accuracy']:.3f}"] for b in calibration["bins"]]
    return table(["slots", "mean confidence", "accuracy"], rows)


def _percent(values: list[float | None]) -> list[str]:
    return ["" if value is None else f"{value:.1%}" for value in values]


def _quoted(text: str) -> str:
    return "`" + repr(text)[1:-1].replace("`", "'") + "`"
