"""The two sides of the step benchmark do the same work where they should."""

import argparse

import pytest

from benchmarks.step_peer import summary
from benchmarks.step_sides import options, problem, run

SMALL = "--blocks 6 --block-size 4 --length 64 --document 24 --vocab 97 --hidden 32 --heads 2 --kv-heads 1 --layers 1"


@pytest.fixture
def args() -> argparse.Namespace:
    return options().parse_args([*SMALL.split(), "--intermediate=48", "--repeat=1"])


def test_every_slot_is_valid_and_anchors_rise(args):
    _, _, batch = problem(args)
    assert batch.targets.valid.shape == (6, 3)
    assert batch.targets.valid.all()
    assert (batch.anchors.diff() > 0).all()
    assert batch.anchors.max() + args.block_size <= args.length


def test_auf_of_a_block_that_is_right_is_the_mean_over_all_slots_and_less_than_of_random_labels(args):
    found = {form: run(form, args) for form in ("auf_1", "auf_all", "decay")}
    assert found["auf_all"]["loss"] < found["auf_1"]["loss"]
    assert all(f["seconds"] > 0 and f["gradient_norm"] > 0 for f in found.values())


def test_the_summary_takes_ratios_within_a_round():
    def rounds(*seconds: float, mib: float) -> list[dict[str, float]]:
        figures = {"peak_mib": mib, "loss": 2.0, "gradient_norm": 4.0}
        return [{"seconds": s, "processor_seconds": 2 * s, **figures} for s in seconds]

    found = {
        "decay": rounds(1.0, 10.0, mib=100.0),
        "auf_1": rounds(0.5, 5.0, mib=50.0),
        "peer_given": rounds(3.0, 20.0, mib=400.0),
    }
    out = summary(found)
    assert out["decay_against_peer_given"]["speed"] == {"median": 2.5, "least": 2.0, "most": 3.0}
    assert out["decay_against_peer_given"]["memory"]["median"] == 0.25
    assert out["auf_1_against_decay"]["time"]["median"] == 0.5
    assert out["relative_difference"] == {"loss": 0.0, "gradient_norm": 0.0}
    assert "decay_against_peer" not in out
