"""A record that was edited by hand, or comes from another version, is one line."""

import copy
import json

import pytest

from specauf.cli import main
from specauf.errors import UserError
from specauf.evaluation.compare import join
from specauf.evaluation.page import html
from specauf.evaluation.record import read_record
from specauf.evaluation.report import markdown
from tests.evaluation.conftest import made_record


def places(value, path=()):
    """Every field of a record, and of its lists the first entry."""
    inner = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for key, below in inner:
        yield (*path, key)
        yield from places(below, (*path, key))


def whole_record() -> dict:
    record = made_record()
    record |= {
        "lossless": False,
        "drafters": {"mine": "digest"},
        "training": {"mine": {"tau": {"step": [1], "value": [2]}}},
    }
    record["cache"] = {"tokens": 5, "documents": 2, "bytes_per_token": 8.5, "head_mass_mean": 0.9}
    record["parts"][0] |= {
        "lossless": False,
        "divergences": [{"task_id": "b/0", "decoder": "mine", "position": 1, "logit_gap": None, "near_tie": False}],
        "comparisons": {"mine/other": {"tau_ratio": 1, "tau_ratio_95": [0.9, 1.1], "prompts": 2}},
    }
    return record


@pytest.mark.parametrize("change", [None, "word", [["word"]], float("nan"), "missing"])
def test_any_field_may_be_wrong(tmp_path, change):
    """What reads a record either names the file, or makes its pages alone and beside a whole one."""
    file, record, refused = tmp_path / "evaluation.json", whole_record(), 0
    for path in places(record):
        changed = copy.deepcopy(record)
        inner = changed
        for key in path[:-1]:
            inner = inner[key]
        if change == "missing":
            del inner[path[-1]]
        else:
            inner[path[-1]] = change
        file.write_text(json.dumps(changed))
        try:
            found = read_record(file)
        except UserError as error:
            refused += str(error).startswith((f"{file}: ", f"{file} is not JSON"))
            continue
        for others in ({}, {"q": record}):
            try:
                joined = join({"p": found, **others})
            except UserError:
                continue  # not measured alike
            json.dumps([html(joined, []), markdown(joined), joined], allow_nan=False)
    assert refused > 40, "each by the name of the file"


def test_commands_name_file_and_field(tmp_path, tiny_cache, place, capsys):
    record = made_record()
    del record["parts"][0]["runs"]["mine"]["tau_pooled_95"]
    (tmp_path / "evaluation.json").write_text(json.dumps(record))
    for words in (["report"], ["audit", str(tiny_cache), str(place / "one"), "--evaluation"]):
        assert main([*words, str(tmp_path)]) == 2
        assert capsys.readouterr().err == (
            f"error: {tmp_path}/evaluation.json: parts[0]: runs['mine']: field tau_pooled_95 is missing: "
            "run `specauf evaluate` again\n"
        )


def test_a_report_is_an_evaluation_too_and_may_hold_what_later_versions_add(tmp_path):
    early = made_record()
    del early["drafters"], early["identity"]
    later = made_record(name="other") | {"more": 1}
    later["parts"][0]["benchmark"]["more"] = later["parts"][0]["runs"]["other"]["by_prompt"]["more"] = None
    for name, record in (("a", early), ("b", later)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "evaluation.json").write_text(json.dumps(record))
    assert main(["report", str(tmp_path / "a"), str(tmp_path / "b"), f"--out={tmp_path}"]) == 0
    assert main(["report", str(tmp_path / "report.json")]) == 0


def test_names_in_one_place_alone_are_refused(tmp_path):
    for field, message in (
        ("drafters", "drafters has other, runs has mine alone"),
        ("training", "training has other, runs has mine alone"),
    ):
        (tmp_path / "evaluation.json").write_text(
            json.dumps(made_record() | {field: {"other": {} if field == "training" else "x"}})
        )
        with pytest.raises(UserError, match=message):
            read_record(tmp_path / "evaluation.json")


def test_one_prompt_gives_no_interval():
    """Drawn again and again it is itself: an interval without width would pass for certainty."""
    two, one, ended = (made_record(accepted=accepted) for accepted in ([[1], [2]], [[1]], [[1], []]))
    for page in (lambda record: markdown(join({"p": record, "q": record})), lambda record: html(record, [])):
        assert "no interval" not in page(two)
        for record in (one, ended):
            assert page(record).count("no interval") >= 2
