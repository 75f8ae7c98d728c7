"""Tokens a second of servers that speak OpenAI's API, on the same prompts in turn: one without a drafter, others with.

    python -m benchmarks.serve plain=http://127.0.0.1:8001 drafted=http://127.0.0.1:8002 [--prompts 32] [--new 128]

Servers of the same target, started by hand (docs/serving.md); the first is what the others are compared with. One
request at a time, greedy, and the order rotates, so that all meet the same machine; a server with nothing to do should
cost next to nothing. Ends with one JSON line.
"""

import argparse
import json
import sys
import time
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

import numpy as np

from benchmarks.common import finish
from specauf.errors import UserError, run_command
from specauf.evaluation.benchmarks import load_benchmark


def ask(url: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """One request, its answer as JSON.

    Raises:
        UserError: the server does not answer, or refuses.
    """
    data = None if body is None else json.dumps(body).encode()
    try:
        request = Request(url.rstrip("/") + path, data, {"Content-Type": "application/json"})
        with build_opener(ProxyHandler({})).open(request, timeout=600) as reply:
            found: dict[str, Any] = json.load(reply)
            return found
    except HTTPError as error:
        said = " ".join(error.read().decode(errors="replace").split())[:200]
        raise UserError(
            f"{url}{path}: {error.code} answered ({said}); start the server with the right options"
        ) from error
    except (OSError, HTTPException, ValueError) as error:
        raise UserError(f"{url}{path}: no answer ({error}); start the server, or correct the address") from error


def complete(url: str, model: str, text: str, new: int) -> dict[str, Any]:
    """The answer to one prompt, how many tokens it has by the server's count, and its seconds."""
    turns = [{"role": "user", "content": text}]
    started = time.perf_counter()
    found = ask(url, "/v1/chat/completions", {"model": model, "messages": turns, "temperature": 0, "max_tokens": new})
    seconds = time.perf_counter() - started
    answer = part(url, found, "choices", 0, "message", "content")
    return {"answer": answer, "tokens": part(url, found, "usage", "completion_tokens"), "seconds": seconds}


def part(url: str, found: Any, *path: str | int) -> Any:
    """What lies at a path of an answer.

    Raises:
        UserError: nothing does.
    """
    try:
        for key in path:
            found = found[key]
    except (KeyError, IndexError, TypeError) as error:
        name = ".".join(map(str, path))
        raise UserError(
            f"{url}: no {name} in its answer; give servers that speak OpenAI's API and count tokens"
        ) from error
    return found


def figures(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Speeds, as ratios to the first with their 95 % intervals over prompts, and how many answers are the first's."""
    first = next(iter(found))
    tokens = {name: np.array([row["tokens"] for row in rows], float) for name, rows in found.items()}
    seconds = {name: np.array([row["seconds"] for row in rows]) for name, rows in found.items()}
    draws = np.random.default_rng(0).integers(0, len(tokens[first]), (2000, len(tokens[first])))

    def speed(name: str, some: Any = slice(None)) -> Any:
        return tokens[name][some].sum(-1) / seconds[name][some].sum(-1)

    return {
        "prompts": len(tokens[first]),
        "tokens": {name: int(value.sum()) for name, value in tokens.items()},
        "tokens_per_second": {name: float(speed(name)) for name in found},
        f"ratio_to_{first}": {
            name: [
                float(speed(name) / speed(first)),
                *np.quantile(speed(name, draws) / speed(first, draws), [0.025, 0.975]).tolist(),
            ]
            for name in found
            if name != first
        },
        "same_answers": {
            name: sum(a["answer"] == b["answer"] for a, b in zip(rows, found[first], strict=True))
            for name, rows in found.items()
        },
    }


def measure(servers: dict[str, str], prompts: list[str], new: int) -> dict[str, list[dict[str, Any]]]:
    """What every server answered to every prompt, by its name."""
    models = {name: part(url, ask(url, "/v1/models"), "data", 0, "id") for name, url in servers.items()}
    for name, url in servers.items():
        complete(url, models[name], prompts[0], new)  # warm
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in servers}
    names = list(servers)
    for number, text in enumerate(prompts):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            found[name].append(complete(servers[name], models[name], text, new))
        times = ", ".join(f"{name} {rows[-1]['seconds']:.2f} s" for name, rows in found.items())
        print(f"{number + 1}/{len(prompts)}: {times}", file=sys.stderr)
    return found


def named(words: list[str]) -> dict[str, str]:
    """NAME=URL of every word.

    Raises:
        UserError: a word is something else, or a name comes twice.
    """
    servers = dict(word.partition("=")[::2] for word in words)
    wrong = [name for name, url in servers.items() if not name or not url.startswith(("http://", "https://"))]
    if wrong or len(servers) < len(words):
        raise UserError(f"servers: {' '.join(words)} found, different NAME=http://... expected; give each its own name")
    return servers


def main() -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("servers", nargs="+", metavar="NAME=URL")
    parser.add_argument("--benchmark", default="humaneval", help="NAME or FILE, as `specauf evaluate` takes them")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args()

    def run() -> None:
        servers = named(args.servers)
        prompts = [prompt.text for prompt in load_benchmark(args.benchmark, args.prompts)]
        result = figures(measure(servers, prompts, args.new))
        finish({"benchmark": "serve", "prompts_of": args.benchmark, "new_tokens": args.new, **result}, args.json)

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
