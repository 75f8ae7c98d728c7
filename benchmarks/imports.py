"""How long the package takes to import and its commands to show their help, beside `import lightning`.

    python -m benchmarks.imports [--rounds 5]

Every command runs in a process of its own, all of them once a round; ratios are taken within a round, by the clock and
by processor time. The first round only warms the page cache and does not count. Ends with one JSON line.
"""

import argparse
import sys

from benchmarks.common import clock, finish, ratios, shown, spread

PYTHON = sys.executable
LIGHTNING = "import lightning"
COMMANDS = {
    LIGHTNING: [PYTHON, "-c", "import lightning"],
    "import specauf": [PYTHON, "-c", "import specauf"],
    "import specauf.module": [PYTHON, "-c", "import specauf.module"],
    "specauf --help": [PYTHON, "-m", "specauf", "--help"],
    "specauf fit --help": [PYTHON, "-m", "specauf", "fit", "--help"],
    "specauf evaluate --help": [PYTHON, "-m", "specauf", "evaluate", "--help"],
    "cache-builder --help": [PYTHON, "-m", "cache_builder", "--help"],
    "cache-builder build --help": [PYTHON, "-m", "cache_builder", "build", "--help"],
}
LIMIT = 1.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args()
    wall: dict[str, list[float]] = {name: [] for name in COMMANDS}
    cpu: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for number in range(args.rounds + 1):
        for name, command in COMMANDS.items():
            seconds, used = clock(command)
            if number:
                wall[name].append(seconds)
                cpu[name].append(used)
    print(f"{'command':28} {'seconds':>20} {'of import lightning':>22} {'of its processor time':>24}")
    found = {}
    for name in COMMANDS:
        found[name] = {
            "seconds": spread(wall[name]),
            "ratio": ratios(wall[name], wall[LIGHTNING]),
            "processor_ratio": ratios(cpu[name], cpu[LIGHTNING]),
        }
        seconds, ratio, processor = (shown(found[name][key]) for key in ("seconds", "ratio", "processor_ratio"))
        print(f"{name:28} {seconds:>20} {ratio:>22} {processor:>24}")
    slowest = max(found, key=lambda name: found[name]["ratio"]["median"])
    worst = found[slowest]["ratio"]["median"]
    verdict = "within" if worst <= LIMIT else "over"
    print(f"slowest: {slowest}, {worst:.2f} of import lightning: {verdict} the goal of {LIMIT}")
    finish({"benchmark": "imports", "rounds": args.rounds, "slowest": worst, "commands": found}, args.json)


if __name__ == "__main__":
    main()
