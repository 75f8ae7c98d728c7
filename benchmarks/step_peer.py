"""A training step beside speculators' DFlash: forward, backward and AdamW at equal shapes, time and peak memory.

    python -m benchmarks.step_peer [--blocks 128] [--block-size 16] [--vocab 49152] [--rounds 2] ...

Every form runs in a process of its own, all of them once a round; ratios are taken within a round. On CUDA one process
of each side, or of both where --python is this interpreter, runs all rounds, for its memory is counted by the allocator
and kernels are compiled once. Memory is the peak beyond weights and batch. Forms, all with cross-entropy, in float32
unless --dtype says otherwise:

- ours: decay; AUF with a new drafter, with one that emits about 3 tokens a cycle, and with every slot right, where
  nothing is left to skip; decay with the linear layers of torch in place of oneDNN's (CPU), with one SDPA a document in
  place of FlexAttention (CUDA).
- speculators 0.9, its eager losses (on a GPU its fused ones), decay. It runs the target's head on the slots to find
  the labels; "labels given" spares it that, the least it could cost.

The peer is installed once, from PyPI, into an environment of its own below build/. Ends with one JSON line.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.common import answer, finish, ratios, shown, spread
from benchmarks.step_sides import FORMS, options
from tests.interop.environments import python_of

Rounds = Mapping[str, Sequence[Mapping[str, Any]]]


def summary(found: Rounds) -> dict[str, Any]:
    """Ratios of the forms: speed above 1 and memory below 1 are ours' favour.

    Args:
        found: the figures of each form, one record a round.
    """

    def ratio(above: str, below: str, key: str) -> dict[str, float]:
        return ratios([r[key] for r in found[above]], [r[key] for r in found[below]])

    out: dict[str, Any] = {}
    for peer in ("peer", "peer_given"):
        for mine in ("decay", "auf_1", "auf_3", "auf_all", "decay_mkl", "decay_sdpa"):
            if peer in found and mine in found:
                out[f"{mine}_against_{peer}"] = {
                    "speed": ratio(peer, mine, "seconds"),
                    "processor": ratio(peer, mine, "processor_seconds"),
                    "memory": ratio(mine, peer, "peak_mib"),
                }
    for form in ("auf_1", "auf_3", "auf_all", "decay_sdpa"):
        if form in found and "decay" in found:
            out[f"{form}_against_decay"] = {
                "time": ratio(form, "decay", "seconds"),
                "processor": ratio(form, "decay", "processor_seconds"),
                "memory": ratio(form, "decay", "peak_mib"),
            }
    if "peer_given" in found and "decay" in found:
        mine, peer = found["decay"][0], found["peer_given"][0]
        out["relative_difference"] = {key: abs(mine[key] / peer[key] - 1) for key in ("loss", "gradient_norm")}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[options()]
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--forms", nargs="+", choices=FORMS, help="all that differ on this device when left out")
    parser.add_argument("--python", help="an interpreter with the package speculators; made when left out")
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args()
    args.forms = args.forms or [f for f in FORMS if f != ("decay_mkl" if args.device == "cuda" else "decay_sdpa")]
    shapes = {key: value for key, value in vars(args).items() if key not in ("rounds", "forms", "python", "json")}
    given = {key: value for key, value in shapes.items() if value is not None}
    words = [word for key, value in given.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    peer = args.python or (str(python_of("speculators")) if any(f.startswith("peer") for f in args.forms) else "")
    pythons = {form: peer if form.startswith("peer") else sys.executable for form in args.forms}
    found: dict[str, list[dict[str, Any]]] = {form: [] for form in args.forms}
    side = ["-m", "benchmarks.step_sides"]
    if args.device == "cuda":
        for python in dict.fromkeys(pythons.values()):
            forms = [form for form in args.forms if pythons[form] == python]
            found |= answer([python, *side, *forms, f"--rounds={args.rounds}", *words])
    else:
        for _ in range(args.rounds):
            for form in args.forms:
                found[form] += answer([pythons[form], *side, form, *words])[form]

    print(
        f"{args.blocks} blocks of {args.block_size} over {args.vocab:,} tokens, {args.length:,} tokens packed, "
        f"{args.dtype}, {args.device}"
    )
    print(f"{'form':30} {'seconds a step':>24} {'processor seconds':>24} {'peak MiB':>9} {'whole process':>14}")
    for form, rounds in found.items():
        seconds, used = (shown(spread([r[key] for r in rounds])) for key in ("seconds", "processor_seconds"))
        peak, whole = (max(r[key] for r in rounds) for key in ("peak_mib", "process_mib"))
        print(f"{FORMS[form]:30} {seconds:>24} {used:>24} {peak:9,.0f} {whole:14,.0f}")
        if all("teraflop" in r for r in rounds):
            print(f"{'':30} {shown(spread([r['teraflop'] / r['seconds'] for r in rounds]), 0)} TFLOP/s")
    result = summary(found)
    for name, figures in result.items():
        parts = (f"{key} {shown(v) if isinstance(v, dict) else format(v, '.1e')}" for key, v in figures.items())
        print(f"{name.replace('_', ' ')}: {', '.join(parts)}")
    finish({"benchmark": "step_peer", "rounds": args.rounds, **shapes, "forms": found, **result}, args.json)


if __name__ == "__main__":
    main()
