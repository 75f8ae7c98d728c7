"""Run a study: build its caches, train, decode, tabulate. What is done is not done again.

python -m studies NAME [--also BENCHMARK...] [--results DIR] [--jobs N] [--tables]

Results that are committed stand in studies/results; a run of your own puts its own beside its runs.
"""

import argparse
import csv
import functools
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from specauf.cache import open_cache
from specauf.errors import UserError, run_command
from specauf.evaluation.benchmarks import benchmark_name
from studies.decode import Decoder
from studies.plan import CachePlan, Group, Study, read_study
from studies.tables import write_tables


def main() -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", help="a file in studies/, without its ending")
    parser.add_argument(
        "--also",
        nargs="*",
        default=[],
        help="further benchmarks, as `specauf evaluate` names them: NAME, FILE, NAME=FILE",
    )
    parser.add_argument(
        "--results", type=Path, help="where results go, in a folder of the study's name; beside its runs by default"
    )
    parser.add_argument("--jobs", type=int, default=1, help="groups worked on side by side, as on a GPU")
    parser.add_argument("--group", type=int, help=argparse.SUPPRESS)  # the number of the one group to do
    parser.add_argument("--tables", action="store_true", help="only write the tables of the results that are there")
    args = parser.parse_args()
    return run_command(lambda: _study(args))


def _study(args: argparse.Namespace) -> None:
    study = read_study(args.name)
    study.decoding.benchmarks.extend(args.also)
    results = Path("runs/study") / study.name / "results" if args.results is None else args.results / study.name
    if args.jobs < 1:
        raise UserError(f"--jobs is {args.jobs}: give at least 1")
    if args.group is not None:
        if not train_and_decode(study, study.groups[args.group], results, _decoder(study)):
            raise UserError("runs failed: see above")
        return
    if not args.tables:
        failed = do_all(study, results, sys.argv[1:], args.jobs)
        if failed:
            raise UserError(
                f"groups {', '.join(failed)} have failed runs (see above); the same command tries them again"
            )
    print(write_tables(study, results))


def do_all(study: Study, results: Path, words: list[str], jobs: int) -> list[str]:
    """Build, train and decode what is missing; returns the groups that failed.

    Args:
        study: what there is to do.
        results: where the results go.
        words: the command line, for the processes that do a group each when there are several jobs.
        jobs: groups worked on at the same time.
    """
    if jobs == 1:
        for cache in study.caches.values():
            build_cache(cache, study.caches)
        decoder = _decoder(study)
        return [group.name for group in study.groups if not train_and_decode(study, group, results, decoder)]

    def work(number: int, build: "Future[None]") -> bool:
        try:
            build.result()
            _call(study.groups[number].name, ["studies", *words, f"--group={number}"])
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return False
        return True

    # One build takes all cores: caches are built one after another, while groups of those that are there go on.
    with ThreadPoolExecutor(1) as builder, ThreadPoolExecutor(jobs) as pool:
        builds = {name: builder.submit(build_cache, cache, study.caches) for name, cache in study.caches.items()}
        _decoder(study)()  # finds the plain answers, which every process reads
        groups = [pool.submit(work, n, builds[group.cache]) for n, group in enumerate(study.groups)]
        return [group.name for group, done in zip(study.groups, groups, strict=True) if not done.result()]


def build_cache(cache: CachePlan, caches: Mapping[str, CachePlan]) -> None:
    """Make one of the study's caches, if it is not complete.

    Raises:
        UserError: the build failed.
    """
    if not (cache.out / "manifest.json").is_file():
        _call(f"cache {cache.out}", cache.command(caches))


def train_and_decode(study: Study, group: Group, results: Path, decoder: Callable[[], Decoder]) -> bool:
    """Train a group's missing runs, then decode those without a result; whether all are there.

    Args:
        study: of the group.
        group: what to train.
        results: where the results go.
        decoder: loads the target once, when the first run is there to be decoded.

    Raises:
        UserError: a result that is there is of other options than the study has now.
    """
    runs = Path("runs/study") / study.name / group.name
    words = ["specauf", "sweep", f"--losses={' '.join(group.losses)}", f"--seeds={' '.join(map(str, group.seeds))}"]
    words += [f"--out={runs}", f"--cache={study.caches[group.cache].out}", f"--drafter={group.drafter}", *group.options]
    wanted = {
        (loss, seed): results / f"{group.name}-{loss}-{seed}.json" for seed in group.seeds for loss in group.losses
    }
    for file in filter(Path.is_file, wanted.values()):
        check_result(json.loads(file.read_text()), file, study, group)
    missing = {key: file for key, file in wanted.items() if not file.is_file()}
    if not missing:
        return True
    try:
        _call(f"group {group.name}", words)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    cache = open_cache(str(study.caches[group.cache].out))
    for (loss, seed), file in missing.items():
        run = runs / f"{loss}-{seed}"
        if (run / "summary.json").is_file():
            record: dict[str, Any] = {
                "group": group.name,
                "loss": loss,
                "seed": seed,
                "options": group.options,
                "drafter": group.drafter,
                "cache": {"name": group.cache, "bytes": cache.manifest.total_bytes},
            }
            record |= {"training": training_facts(run), **decoder().decode(run)}
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(record) + "\n")
            taus = {name: 1 + sum(b["accepted"]) / sum(b["cycles"]) for name, b in record["benchmarks"].items()}
            print(f"{file.stem}: tau " + ", ".join(f"{name} {tau:.3f}" for name, tau in taus.items()), flush=True)
    return all(file.is_file() for file in wanted.values())


def check_result(record: Mapping[str, Any], file: Path, study: Study, group: Group) -> None:
    """Refuse a result of a training or a decoding that is not the study's any more.

    Raises:
        UserError: naming what differs, with both values.
    """
    # Results from before the cache's name was written down have none.
    cache = record.get("cache", {}).get("name", group.cache)
    fields: list[tuple[str, Any, Any]] = [
        ("options", _that_count(record["options"]), _that_count(group.options)),
        ("drafter", record["drafter"], group.drafter),
        ("cache", cache, group.cache),
    ]
    fields += [(f, record["decoding"][f], getattr(study.decoding, f)) for f in ("limit", "max_new_tokens")]
    for field, found, expected in fields:
        if found != expected:
            raise UserError(
                f"{file}: {field}: {found} found, {expected} in the study: remove the file and its run to train anew, "
                "or name the group otherwise"
            )
    lacking = [n for n in map(benchmark_name, study.decoding.benchmarks) if n not in record["benchmarks"]]
    if lacking:
        raise UserError(
            f"{file}: benchmarks: {', '.join(record['benchmarks'])} found, {', '.join(lacking)} in the study or --also "
            "too: remove the file to decode its run again; what was trained stays"
        )


def _that_count(options: Sequence[str]) -> list[str]:
    """Options once each, but for that of the attention kernel, which all give the same numbers."""
    return [o for o in dict.fromkeys(options) if not o.startswith("--model.drafter.init_args.attention=")]


def _decoder(study: Study) -> Callable[[], Decoder]:
    answers = Path("runs/study") / study.name / "answers.json"
    return functools.cache(lambda: Decoder(study.target, study.decoding, answers))


def training_facts(run: Path) -> dict[str, Any]:
    """The run's summary, and the mean of its last looks at every slot of the block."""
    facts: dict[str, Any] = json.loads((run / "summary.json").read_text())
    log = run / "metrics.csv"  # a run shorter than one logging interval has none
    rows = list(csv.DictReader(log.read_text().splitlines())) if log.is_file() else []
    seen = [float(row["train/token_accuracy"]) for row in rows if row.get("train/token_accuracy")]
    facts["token_accuracy"] = statistics.fmean(seen[-5:]) if seen else None
    return facts


def _call(what: str, words: list[str]) -> None:
    print("+ python -m " + " ".join(words), flush=True)
    if subprocess.run([sys.executable, "-m", *words], check=False).returncode:
        raise UserError(f"{what} failed: see above")


if __name__ == "__main__":
    sys.exit(main())
