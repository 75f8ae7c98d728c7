"""Study files are checked before hours are spent, and tables follow from the JSON records alone."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy import stats

from specauf.errors import UserError
from studies.__main__ import check_result, train_and_decode
from studies.plan import FOLDER, Curve, Group, read_study
from studies.plots import plot_curve
from studies.records import gain, gain_over_seeds, p_over_seeds, tau
from studies.tables import compare, curve_table, gains, several_tests, table, write_tables


def record(loss: str, seed: int, accepted: list[int], cycles: list[int]) -> dict[str, Any]:
    part = {"task_id": [str(i) for i in range(len(cycles))], "accepted": accepted, "cycles": cycles}
    training = {"tau": 1.5, "token_accuracy": 0.2, "seconds": 60.0, "steps": 1302}
    return {
        "group": "g",
        "loss": loss,
        "seed": seed,
        "training": training,
        "benchmarks": {"b": part | {"identical": len(cycles)}},
    }


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_study_reads_and_names_what_exists(file: Path) -> None:
    study = read_study(file.stem)
    root = FOLDER.parent
    for cache in study.caches.values():
        for option in cache.options:
            if option.startswith("--config="):
                assert (root / option.removeprefix("--config=")).is_file()
    for group in study.groups:
        assert group.options[0] == "--config=configs/demo.yaml"
        assert group.options.count("--config=configs/demo.yaml") == 1  # groups of one YAML anchor share its list
        for loss in group.losses:
            assert (root / "configs" / "loss" / f"{loss}.yaml").is_file()
        assert (root / "configs" / "drafter" / f"{group.drafter}.yaml").is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": [{"name": "g", "cache": "none", "losses": ["decay"], "seeds": [0]}]}, "'none', known are demo"),
        ({"groups": [{"name": "g", "cache": "demo", "losses": ["auf"], "seeds": [0]}]}, "compares with 'decay'"),
        ({"groups": [{"name": "g", "cache": "demo", "loses": ["auf"], "seeds": [0]}]}, "loses found"),
        ({"caches": {"demo": {"out": "x", "source": "large"}}}, "shrunk from 'large', known before it: "),
        ({"surplus": 1}, "surplus found"),
        ({"curves": [{"file": "a.png", "x": "hours", "of": []}]}, "'hours': give one of steps, bytes"),
        ({"curves": [{"file": "a.png", "x": "steps", "of": ["b8/ce"]}]}, "'b8/ce' found, one of b8/auf"),
        ({"decoding": {}}, "decoding"),
    ],
)
def test_a_wrong_study_is_one_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    raw = yaml.safe_load((FOLDER / "reduced.yaml").read_text())
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(raw | change))
    with pytest.raises(UserError, match=message):
        read_study(str(tmp_path / "mine.yaml"))


def test_a_study_that_is_no_yaml_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("caches: [\n")
    with pytest.raises(UserError, match=r"mine\.yaml is not YAML: "):
        read_study(str(tmp_path / "mine.yaml"))


def test_results_of_different_benchmarks_are_not_put_into_one_table(tmp_path: Path) -> None:
    study = read_study("reduced")
    for seed, name in ((0, "b"), (1, "c")):
        found = record("auf", seed, [1], [2])
        found["benchmarks"] = {name: found["benchmarks"]["b"]}
        (tmp_path / f"g-auf-{seed}.json").write_text(json.dumps(found))
    with pytest.raises(UserError, match=r"benchmarks: b in .*g-auf-0\.json, c in .*g-auf-1\.json"):
        write_tables(study, tmp_path)


def test_an_unknown_study_lists_the_known() -> None:
    with pytest.raises(UserError, match="reduced"):
        read_study("nosuch")


def test_tau_is_pooled_and_gains_are_paired_over_seeds_and_prompts() -> None:
    base = [record("decay", s, [1, 2, 3], [10, 10, 10]) for s in (0, 1)]
    better = [record("auf", s, [6, 7, 8], [10, 10, 10]) for s in (0, 1, 2)]
    assert tau(base[0], "b") == pytest.approx(1.2)
    ratio, low, high = gain(better, base, "b") or (0, 0, 0)
    assert ratio == pytest.approx(1.7 / 1.2)  # seed 2 has no partner
    # Every prompt gains half a token: in pairs the interval is narrow, though prompts differ among themselves.
    assert 1.3 < low <= ratio <= high < 1.6
    assert gain(better, [record("decay", 7, [1], [1])], "b") is None


def test_the_table_has_a_row_a_loss_with_its_interval() -> None:
    group = Group("g", "demo", ["decay", "auf", "ce"], [0, 1], note="tiny")
    rows = [
        record("decay", 0, [1, 2], [10, 10]),
        record("auf", 0, [3, 4], [10, 10]),
        record("auf", 1, [4, 4], [10, 10]),
    ]
    lines = table(group, rows).splitlines()
    assert lines[0] == "### g: tiny"
    assert [line.split(" | ")[0] for line in lines[4:]] == ["| **decay**", "| auf"]
    assert "1.375 [1.350, 1.400]" in lines[5]
    assert "+17.4 % (" in lines[5]
    assert lines[5].endswith("4/4 |")


def test_gains_stand_in_the_order_of_the_base_and_only_where_paired() -> None:
    good, poor = Group("good", "demo", ["decay", "auf"], [0]), Group("poor", "demo", ["decay", "auf", "ce"], [0, 1])
    alone = Group("alone", "demo", ["decay", "auf"], [0])
    lines = gains(
        [
            (good, [record("decay", 0, [9], [10]), record("auf", 0, [10], [10])]),
            (poor, [record("decay", 0, [1], [10]), record("auf", 0, [2], [10]), record("ce", 1, [3], [10])]),
            (alone, [record("auf", 0, [9], [10])]),
        ]
    ).splitlines()
    assert lines[4:] == [
        "| poor: auf / decay | 1,302 | 1 | 1.100 | +9.1 % (+9.1 % to +9.1 %) | +0.0 % |",
        "| good: auf / decay | 1,302 | 1 | 1.900 | +5.3 % (+5.3 % to +5.3 %) | +0.0 % |",
    ]


def test_groups_are_compared_by_prompts_and_by_three_seeds() -> None:
    small = [record("auf", s, [12], [10]) | {"group": "small", "cache": {"bytes": 10**6}} for s in (0, 1)]
    large = [record("auf", s, [10], [10]) for s in (0, 1, 2)]
    row = ["small/auf", "g/auf", "2", "2.200, 2.000", "+10.0 % (+10.0 % to +10.0 %)", "-", "1.500, 1.500", "+0.0 %"]
    lines = compare([("small/auf", "g/auf"), ("g/auf", "none/ce")], small + large).splitlines()
    assert lines[4:] == [f"| {' | '.join([*row, '60, 60', '1, -'])} |"]
    small.append(record("auf", 2, [15], [10]) | {"group": "small"})
    (line,) = compare([("small/auf", "g/auf")], small + large).splitlines()[4:]
    low, high = gain_over_seeds(small, large, "b")[1:]  # type: ignore[index]
    assert f"| 3 | 2.300, 2.000 | +15.0 % (+15.0 % to +15.0 %) | +14.8 % ({100 * (low - 1):+.1f} % to " in line
    assert low < 1 < high


def test_repeats_of_a_seed_are_paired_with_their_own() -> None:
    first = [record("auf", 0, [9, 9], [4, 4]), record("decay", 0, [5, 7], [4, 4])]
    again = [r | {"repeat": 1} for r in (record("auf", 0, [3, 1], [4, 4]), record("decay", 0, [2, 2], [4, 4]))]
    alone = record("auf", 0, [40, 40], [4, 4]) | {"repeat": 2}
    both = gain([first[0], again[0], alone], [first[1], again[1]], "b")
    assert both == gain([first[0], again[0]], [first[1], again[1]], "b")
    assert both is not None
    assert both[0] == pytest.approx((22 / 16 + 1) / (16 / 16 + 1))


def test_the_interval_over_seeds_is_student_s_and_pools_repeats() -> None:
    base = [record("decay", s, [10], [10]) for s in (0, 1, 2)]
    better = [record("auf", s, [a], [10]) for s, a in ((0, 12), (1, 11), (2, 14), (3, 90))]
    assert gain_over_seeds(better[:2], base, "b") is None  # two seeds say nothing of a third
    assert gain_over_seeds([r | {"loss": "never-starts"} for r in base], base, "b") is None
    found = gain_over_seeds(better, base, "b")
    assert found is not None
    logs = np.log([2.2 / 2, 2.1 / 2, 2.4 / 2])
    half = 4.302653 * logs.std(ddof=1) / 3**0.5  # Student's t, 2 degrees of freedom
    assert np.log(found) == pytest.approx([logs.mean(), logs.mean() - half, logs.mean() + half], rel=1e-6)
    # A repeat that only repeats must not count as a seed of its own.
    again = [r | {"repeat": 1} for r in (*base, *better)]
    assert gain_over_seeds([*better, *again[3:]], [*base, *again[:3]], "b") == pytest.approx(found)


def test_across_groups_the_interval_over_seeds_is_welch_s() -> None:
    """What two groups share by a seed is its number: that their taus go up and down together may be chance."""
    base = [record("decay", s, [a], [10]) | {"group": "other"} for s, a in ((0, 10), (1, 12), (2, 11))]
    better = [record("auf", s, [a], [10]) for s, a in ((0, 15), (1, 18), (2, 16))]
    found = gain_over_seeds(better, base, "b")
    assert found is not None
    one, other = (np.log([a / 10 + 1 for a in sums]) for sums in ((15, 18, 16), (10, 12, 11)))
    parts = [logs.var(ddof=1) / 3 for logs in (one, other)]
    freedom = sum(parts) ** 2 / sum(part**2 / 2 for part in parts)
    half = stats.t.ppf(0.975, freedom) * sum(parts) ** 0.5
    mean = one.mean() - other.mean()
    assert np.log(found) == pytest.approx([mean, mean - half, mean + half], rel=1e-6)
    p = p_over_seeds(better, base, "b")
    assert p == pytest.approx(2 * stats.t.sf(mean / sum(parts) ** 0.5, freedom))


def test_many_tests_are_corrected_for_their_number() -> None:
    raw = read_study("reduced")
    study = replace(raw, groups=[Group("g", "demo", ["decay", "auf", "ce"], [0, 1, 2])], comparisons=[])
    base = [record("decay", s, [10], [10]) for s in (0, 1, 2)]
    sure = [record("auf", s, [a], [10]) for s, a in ((0, 2000), (1, 2010), (2, 1990))]
    noise = [record("ce", s, [a], [10]) for s, a in ((0, 9), (1, 10), (2, 11))]
    assert several_tests(study, base + sure[:2]) == ""
    text = several_tests(study, base + sure + noise)
    assert "Of 2 intervals by seeds 1 leave out 0, where 0 would" in text
    assert re.search(r"remain: g/auf against g/decay on b \(p = [\d.e-]+\)\.$", text)
    # p is 0.02: alone it would count, but not beside another.
    weak = [record("auf", s, [a], [10]) for s, a in ((0, 12), (1, 13), (2, 14))]
    assert p_over_seeds(weak, base, "b") == pytest.approx(0.034, abs=0.01)
    assert several_tests(study, base + weak + noise).endswith("there remain: none.")


def test_only_results_of_the_same_prompts_are_put_into_one_table(tmp_path: Path) -> None:
    for seed in (0, 1):
        found = record("auf", seed, [3, 4], [10, 10])
        if seed:
            found["benchmarks"]["b"]["task_id"].reverse()
        (tmp_path / f"g-auf-{seed}.json").write_text(json.dumps(found))
    with pytest.raises(UserError, match=r"b: .*g-auf-0\.json and .*g-auf-1\.json decoded different prompts"):
        write_tables(read_study("reduced"), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": ["--a=2"]}, r"options: \['--a=2'\] found, \['--a=1'\] in the study"),
        ({"drafter": "domino"}, "drafter: domino found, dflash in the study"),
        ({"cache": {"name": "large"}}, "cache: large found, demo in the study"),
        ({"decoding": {"limit": 9, "max_new_tokens": 48}}, "limit: 9 found, 64 in the study"),
        ({"benchmarks": {"gsm8k": {}}}, "benchmarks: gsm8k found, humaneval in the study or --also too"),
    ],
)
def test_a_result_of_other_options_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    study = read_study("reduced")
    group = Group("g", "demo", ["auf"], [0], options=["--a=1", "--model.drafter.init_args.attention=sdpa"])
    kept = record("auf", 0, [1], [2]) | {"options": ["--a=1"], "drafter": "dflash"}
    kept |= {"decoding": {"limit": 64, "max_new_tokens": 48}, "benchmarks": {"humaneval": {}, "more": {}}}
    file = tmp_path / "g-auf-0.json"
    file.write_text(json.dumps(kept))
    assert train_and_decode(study, group, tmp_path, pytest.fail)
    file.write_text(json.dumps(kept | change))
    with pytest.raises(UserError, match=message):
        train_and_decode(study, group, tmp_path, pytest.fail)


def test_the_committed_results_are_of_their_studies() -> None:
    for name in ("full", "reduced"):
        study = read_study(name)
        for file in sorted((FOLDER / "results" / name).glob("*.json")):
            found = json.loads(file.read_text())
            for group in study.groups:
                if group.name == found["group"] and found["loss"] in group.losses and found["seed"] in group.seeds:
                    check_result(found, file, study, group)


def test_a_curve_has_every_training_of_a_kind_in_the_order_of_its_amount(tmp_path: Path) -> None:
    curve = Curve("a.png", ["g/auf", "g/decay", "g/ce"], "bytes")
    large = [record("auf", s, [5, 5], [10, 10]) | {"cache": {"bytes": 10**8}} for s in (0, 1)]
    small = record("decay", 0, [3, 3], [10, 10]) | {"cache": {"bytes": 10**6}}
    rows = [*large, record("auf", 2, [5, 5], [10, 10]), small, record("ce", 0, [1, 1], [10, 10])]
    # The third has no size of its own, and nothing tells that of the last.
    assert [(n, x, len(rs)) for n, x, rs in curve.points(rows)] == [("g/decay", 1.0, 1), ("g/auf", 100.0, 3)]
    assert curve_table(curve, rows).splitlines()[4:] == [
        "| g/decay | 1 | 1 | 1.300 | 1.500 |",
        "| g/auf | 100 | 3 | 1.500 [1.500, 1.500] | 1.500 [1.500, 1.500] |",
    ]
    plot_curve(curve, rows, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
