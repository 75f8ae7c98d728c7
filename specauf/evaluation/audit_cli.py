"""`specauf audit CACHE DRAFTER`."""

import math
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from specauf.cache import Cache, open_cache
from specauf.checkpoint import known_digests, load_drafter
from specauf.command import beside_json, run_function, write_json
from specauf.drafters import Drafter, TargetVocabulary
from specauf.errors import UserError
from specauf.evaluation.audit import audit_record
from specauf.evaluation.audit_blocks import observe_documents
from specauf.evaluation.audit_report import markdown
from specauf.evaluation.record import EVALUATION, read_record
from specauf.progress import progress


def audit_command(
    cache: str,
    drafter: Path,
    split: Literal["held_out", "train"] = "held_out",
    documents: int = 32,
    anchors_per_document: int = 8,
    gamma: float = 7.0,
    seed: int = 0,
    evaluation: Path | None = None,
    run: str | None = None,
    out: Path | None = None,
    json: str | None = None,
) -> None:
    """Audit how training of a drafter is aligned with inference, from a cache and without the target.

    Args:
        cache: directory or URL of a cache of the drafter's target.
        drafter: run directory, checkpoint, z-lab or speculators directory.
        split: which documents.
        documents: at most so many.
        anchors_per_document: blocks that training would draw from each.
        gamma: of the decay it is compared with; 4 for blocks of 8, 7 for 16.
        seed: of the anchors.
        evaluation: an evaluation.json with real greedy decoding of this drafter, in blocks of any size.
        run: the drafter's name there, when it holds several.
        out: directory for audit.md and audit.json; none are written when not given.
        json: write the figures to this file too, or to standard output for -.
    """
    for name, value in (("documents", documents), ("anchors_per_document", anchors_per_document)):
        if value < 1:
            raise UserError(f"{name} is {value}: give at least 1")
    if not 0 < gamma < math.inf:
        raise UserError(f"gamma is {gamma}: give a number above 0")
    opened = open_cache(cache)
    loaded = load_drafter(drafter, opened.manifest.identity.num_target_layers)
    evaluated = _evaluated(evaluation, run, drafter, loaded)
    if evaluated is not None:
        evaluated["block_size"] = evaluated["block_size"] or loaded.config.block_size
    _check(loaded, opened, cache)
    text = _texts(opened)
    found = opened.documents(split=split, topk=False, features=loaded.needs_features)
    total = min(documents, len(found))
    if total == 0:
        raise UserError(f"split: the cache has no {split} documents: give --split=train")
    with progress("auditing", total, unit="documents") as advance:

        def counted() -> Any:
            for document in islice(found, documents):
                yield document
                advance(1)

        observed = observe_documents(
            loaded,
            TargetVocabulary.from_cache(opened),
            counted(),
            anchors_per_document,
            seed,
            evaluated_block=evaluated["block_size"] if evaluated else None,
        )
    record: dict[str, Any] = {
        "drafter": str(drafter),
        "cache": cache,
        "cache_fingerprint": opened.fingerprint,
        "split": split,
        "features": opened.manifest.identity.features,
        "target_argmax_is_data": opened.manifest.counts.argmax_is_data,
    } | audit_record(
        observed,
        gamma=gamma,
        text=text,
        greedy=bool(opened.manifest.identity.regeneration.get("greedy")),
        evaluation=evaluated,
    )
    page = markdown(record)
    print(page, file=beside_json(json))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "audit.md").write_text(page)
        write_json(str(out / "audit.json"), record)
    write_json(json, record)


def _check(drafter: Drafter, cache: Cache, where: str) -> None:
    identity = cache.manifest.identity
    config = drafter.config
    expected: dict[str, Any] = {
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "num_target_layers": config.num_target_layers,
    }
    if drafter.needs_features:
        expected["taps"] = config.taps
        if identity.features == "none":
            raise UserError(f"cache {where}: features is 'none', the drafter reads some: build a cache with features")
    identity.require(where, **expected)


def _texts(cache: Cache) -> Any:
    """Text of a token id, by the tokenizer in the cache."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(cache.target.tokenizer_directory)
    known: dict[int, str] = {}

    def text(token: int) -> str:
        if token not in known:
            known[token] = str(tokenizer.decode([token]))
        return known[token]

    return text


def _evaluated(file: Path | None, run: str | None, place: Path, drafter: Drafter) -> dict[str, Any] | None:
    if file is None:
        return None
    record = read_record(file / EVALUATION if file.is_dir() else file)
    greedy = [part for part in record["parts"] if part["benchmark"]["temperature"] == 0]
    if not greedy:
        raise UserError(f"evaluation: {file} has no greedy decoding: run specauf evaluate with --temperatures=[0]")
    runs = greedy[0]["runs"]
    if run is None and len(runs) > 1:
        raise UserError(f"run: {file} holds {', '.join(runs)}: name the drafter's with --run")
    name = run or next(iter(runs))
    if name not in runs:
        raise UserError(f"run: {name} found, one of {', '.join(runs)} expected: name one of {file} with --run")
    digest = record.get("drafters", {}).get(name)
    if digest is not None and digest not in known_digests(drafter, place):
        raise UserError(
            f"run: {name} in {file} has other weights than {place}: evaluate this drafter, or name its run with --run; "
            "an export in float16 counts as another drafter than its run"
        )
    return {**runs[name], "block_size": greedy[0]["benchmark"]["block_size"]}


def audit(argv: list[str]) -> None:
    """Parse and run `specauf audit`; the first two words without a flag are the cache and the drafter."""
    words = list(argv[1:])
    names = ["--cache", "--drafter"]
    for i, name in enumerate(names):
        if i < len(words) and not words[i].startswith("-"):
            words[i] = f"{name}={words[i]}"
        else:
            break  # the rest has flags
    run_function(audit_command, [argv[0], *words])
