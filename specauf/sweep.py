"""`specauf sweep`: the same training for several losses and seeds, one process each, and a table of what came out."""

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import yaml

from specauf.cli import newest
from specauf.command import CommandParser, beside_json, write_json
from specauf.configs import find_config
from specauf.errors import UserError
from specauf.progress import progress

LARGEST_SEED = 2**32 - 1  # of Lightning's seed_everything
SUMMARY, LAST = "summary.json", "checkpoints/last.ckpt"  # SUMMARY as specauf.callbacks.Summary writes it
_OURS = (
    "--model.loss",
    "--seed_everything",
    "--trainer.default_root_dir",
    "--ckpt_path",
    "--checkpoints.directory",  # of one run
)


@dataclass(frozen=True)
class Run:
    """One run of a sweep.

    Attributes:
        loss: name of a file in configs/loss/, or a path to one.
        seed: of initial weights, document order and anchors.
        directory: where it goes.
    """

    loss: str
    seed: int
    directory: Path

    @property
    def name(self) -> str:
        """The loss without path and suffix."""
        return Path(self.loss).stem

    def resolved(self) -> Any:
        """What the loss's file says."""
        return yaml.safe_load(find_config("loss", self.loss).read_text())

    def summary(self) -> dict[str, Any] | None:
        """What the finished run came to; None while it is not finished."""
        file = self.directory / SUMMARY
        return json.loads(file.read_text()) if file.is_file() else None

    def command(self, options: Sequence[str]) -> list[str]:
        """The plain `specauf fit` that does this run, from its last checkpoint if it was begun."""
        words = ["fit", "-c", "fit", f"--model.loss={self.loss}", *options]
        words += [f"--seed_everything={self.seed}", f"--trainer.default_root_dir={self.directory}"]
        return words + ([f"--ckpt_path={self.directory / LAST}"] if (self.directory / LAST).is_file() else [])


def sweep(argv: list[str]) -> None:
    """Run a sweep from a command line; options it does not know go to `specauf fit`.

    Raises:
        UserError: an option is wrong, or a run failed; the others are still done and in the table.
    """
    parser = CommandParser(
        prog="specauf sweep",
        description="train every loss with every seed; finished runs are kept, other options go to specauf fit",
    )
    parser.add_argument(
        "--losses", type=str, required=True, help="names in configs/loss/ or YAML files, separated by spaces"
    )
    parser.add_argument("--seeds", type=str, default="0", help="numbers, separated by spaces")
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"), help="each run goes to OUT/LOSS-SEED")
    parser.add_argument("--cache", type=str, default=None, help="the cache; the newest in caches/ when left out")
    parser.add_argument("--drafter", type=str, default=None, help="name in configs/drafter/; else the files name it")
    parser.add_argument(
        "--json", type=str, default=None, help="write table and runs to this file too; - for standard output"
    )
    known, rest = _split(argv[1:], ["losses", "seeds", "out", "cache", "drafter", "json"])
    config = parser.parse_args(known)
    runs = plan(config.losses, config.seeds, config.out)
    if any(option.partition("=")[0] in _OURS for option in rest):
        raise UserError(f"specauf sweep sets {', '.join(_OURS)} itself: give --losses, --seeds and --out")
    if config.cache is None and not any(option.partition("=")[0] == "--data.cache" for option in rest):
        config.cache = newest("caches/*/manifest.json", "cache", "--cache").parent
    cache = [] if config.cache is None else [f"--data.cache={config.cache}"]
    # Only when given: a flag would beat the drafter of a file in `rest`.
    drafter = [] if config.drafter is None else [f"--model.drafter={config.drafter}"]
    options = [*cache, *drafter, *rest]
    failed = execute(runs, options)
    results = summarise(runs)
    print(table(results), file=beside_json(config.json))
    write_json(config.json, {"options": options, "losses": results, "failed": failed})
    if failed:
        lines = "; ".join(f"{directory}: {reason}" for directory, reason in failed.items())
        raise UserError(f"{len(failed)} of {len(runs)} runs failed: {lines}. The same command tries only these again")


def _split(words: list[str], names: list[str]) -> tuple[list[str], list[str]]:
    """Options of the sweep, and all others."""
    ours: list[str] = []
    others: list[str] = []
    mine = False
    for word in words:
        if word.startswith("-") and word != "-":
            mine = word.partition("=")[0] in [*(f"--{name}" for name in names), "--help", "-h"]
        (ours if mine else others).append(word)
    return ours, others


def plan(losses: str, seeds: str, out: Path) -> list[Run]:
    """The runs of a sweep, seed by seed, so that every loss has been tried once early on.

    Raises:
        UserError: a loss is unknown, a seed is no number, one is given twice, or two losses are of one name.
    """
    names, numbers = losses.replace(",", " ").split(), seeds.replace(",", " ").split()
    for what, words in (("losses", names), ("seeds", [number.lstrip("0") for number in numbers])):
        if not words or len(set(words)) < len(words):
            given = losses if what == "losses" else seeds
            raise UserError(f"--{what} is {given!r}: give different ones, separated by spaces")
    stems: dict[str, str] = {}
    for name in names:
        find_config("loss", name)
        other = stems.setdefault(Path(name).stem, name)
        if other != name:
            raise UserError(
                f"--losses: {other} and {name} are both called {Path(name).stem}, which names the runs' directories: "
                "rename one"
            )
    for number in numbers:
        if not number.isdecimal() or int(number) > LARGEST_SEED:
            raise UserError(f"--seeds: {number!r} is no seed: give numbers from 0 to {LARGEST_SEED}")
    return [Run(name, int(n), out / f"{Path(name).stem}-{n}") for n in numbers for name in names]


def execute(runs: Sequence[Run], options: Sequence[str]) -> dict[str, str]:
    """Do the runs that are not finished, one after another; returns directory and reason of those that failed.

    Raises:
        UserError: a run had other options or another loss of this name.
    """
    failed: dict[str, str] = {}
    for run in runs:
        _check_same(run, options)
    with progress("sweep", float(len(runs)), unit="runs") as advance:
        for run in runs:
            if run.summary() is None:
                run.directory.mkdir(parents=True, exist_ok=True)
                (run.directory / "sweep.yaml").write_text(yaml.safe_dump(_kept(run, options)))
                if not (run.directory / LAST).is_file():
                    (run.directory / "config.yaml").unlink(missing_ok=True)  # it ended before its first checkpoint
                said = run.directory / "stderr.txt"
                with said.open("w") as file:
                    status = run_to_the_end([sys.executable, "-m", "specauf", *run.command(options)], file)
                if not status and run.summary() is None:
                    failed[str(run.directory)] = f"it ended without a {SUMMARY}, as fast_dev_run does"
                elif status:
                    lines = [line for line in said.read_text().splitlines() if line.strip()]
                    failed[str(run.directory)] = lines[-1].removeprefix("error: ") if lines else f"status {status}"
            advance(1, note=f"{run.name} seed {run.seed} {'failed' if str(run.directory) in failed else 'done'}")
    return failed


def run_to_the_end(command: list[str], said: IO[str]) -> int:
    """Run a command to its end; returns its status. A stop of this process is one of the command, which ends first."""
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
    try:
        return child.wait()
    except KeyboardInterrupt:
        child.terminate()  # it writes last.ckpt
        child.wait()
        raise


def _kept(run: Run, options: Sequence[str]) -> dict[str, Any]:
    """What a run's `sweep.yaml` holds; `loss` is missing in early ones."""
    return {"options": list(options), "loss": run.resolved()}


def _check_same(run: Run, options: Sequence[str]) -> None:
    file = run.directory / "sweep.yaml"
    if not file.is_file():
        return
    before, now = yaml.safe_load(file.read_text()), _kept(run, options)
    hint = "choose another --out, or delete that directory"
    if before["options"] != now["options"]:
        raise UserError(
            f"--out: {run.directory} was run with {' '.join(before['options'])}, now {' '.join(options)}: {hint}"
        )
    old, new = _flat(before.get("loss", now["loss"])), _flat(now["loss"])
    for name in [*old, *new]:
        if old.get(name) != new.get(name):
            raise UserError(
                f"--losses: {run.loss} has {name} {new.get(name)}, {run.directory} was run with {old.get(name)}: {hint}"
            )


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """The scalars and lists of a loss's file by their dotted names."""
    if not isinstance(value, dict):
        return {name: value}
    return {key: v for part, inner in value.items() for key, v in _flat(inner, f"{name}.{part}".strip(".")).items()}


def summarise(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """Mean and spread of the best tau of each loss over its finished runs."""
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(run.name for run in runs):
        summaries = {run.seed: run.summary() for run in runs if run.name == name}
        done = {seed: s for seed, s in summaries.items() if s is not None}
        taus = [s["best_tau"] for s in done.values() if s["best_tau"] is not None]
        found[name] = {
            "runs": len(done),
            "tau_mean": statistics.mean(taus) if taus else None,
            "tau_sd": statistics.stdev(taus) if len(taus) > 1 else None,
            "tau_min": min(taus, default=None),
            "tau_max": max(taus, default=None),
            "seconds_mean": statistics.mean(s["seconds"] for s in done.values()) if done else None,
            "by_seed": {str(seed): s for seed, s in done.items()},
        }
    return found


def table(results: dict[str, dict[str, Any]]) -> str:
    """Plain text: one line per loss, best tau first. sd is the sample's standard deviation over seeds."""
    lines = [f"{'loss':24} {'runs':>4} {'tau':>7} {'sd':>7} {'min':>7} {'max':>7} {'seconds':>8}"]

    def cell(value: float | None, width: int = 7, digits: int = 3) -> str:
        return f"{'-':>{width}}" if value is None else f"{value:{width}.{digits}f}"

    for name, row in sorted(results.items(), key=lambda item: -(item[1]["tau_mean"] or 0)):
        cells = [cell(row[key]) for key in ("tau_mean", "tau_sd", "tau_min", "tau_max")]
        lines.append(f"{name:24} {row['runs']:4} {' '.join(cells)} {cell(row['seconds_mean'], 8, 1)}")
    return "\n".join(lines)
