import sys

import pytest

from benchmarks.common import answer, clock, finish, growth, machine, ratios, shown, spread


def test_spread_and_ratios_are_of_rounds():
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "least": 1.0, "most": 3.0}
    # A round that was ten times slower for both counts like any other.
    assert ratios([2.0, 20.0, 6.0], [1.0, 10.0, 2.0]) == {"median": 2.0, "least": 2.0, "most": 3.0}
    with pytest.raises(ValueError, match="shorter"):
        ratios([1.0, 2.0], [1.0])


def test_shown_names_median_least_and_most():
    assert shown(spread([1000.0, 2000.5, 3000.0]), 1) == "2,000.5 (1,000.0 to 3,000.0)"


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_growth_is_the_exponent(power):
    sizes = [10.0, 100.0, 1000.0]
    assert growth(sizes, [7 * s**power for s in sizes]) == pytest.approx(power)


def test_growth_needs_two_sizes():
    with pytest.raises(ValueError, match="constant"):
        growth([5.0, 5.0], [1.0, 2.0])


def test_answer_reads_the_last_line_and_passes_the_environment():
    script = "import os; print('other words'); print('{\"x\": ' + os.environ['GIVEN'] + '}')"
    assert answer([sys.executable, "-c", script], GIVEN="3") == {"x": 3}


def test_clock_counts_the_childs_processor_time():
    busy = "import time\nend = time.process_time() + 0.2\nwhile time.process_time() < end: pass"
    seconds, processor = clock([sys.executable, "-c", busy])
    assert processor >= 0.2
    assert seconds >= 0.1


def test_finish_prints_and_writes_the_same_line(tmp_path, capsys):
    finish({"benchmark": "x", "figure": 1.5}, str(tmp_path / "x.json"))
    line = capsys.readouterr().out
    assert (tmp_path / "x.json").read_text() == line
    assert '"figure": 1.5' in line
    assert set(machine()) >= {"processor", "cores", "load", "date", "torch"}
