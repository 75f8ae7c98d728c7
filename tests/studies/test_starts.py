"""What a study starts from beside the demo's corpus and random weights, and that it loads its target once."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cache_builder.stdlib_corpus import stdlib_prompts
from studies import __main__ as studies_main
from studies.corpora import author_answers
from studies.late_layers import late_layers
from studies.plan import Group, read_study
from tests.builder.conftest import make_target

SOURCE = '''
class A:
    def area(self, r):
        """The area of a circle of radius r."""
        return 3 * r * r
'''


def test_every_prompt_has_its_author_s_answer(tmp_path: Path) -> None:
    (tmp_path / "geometry.py").write_text(SOURCE)
    answers = author_answers(tmp_path, stdlib_prompts(tmp_path))
    assert list(answers) == stdlib_prompts(tmp_path)
    assert author_answers(tmp_path, []) == {}
    (answer,) = answers.values()
    assert answer.startswith("```python\ndef area(self, r):\n")
    assert answer.endswith("    return 3 * r * r\n```")


def test_late_layers_are_the_target_s_with_norms_of_its_scale() -> None:
    target = make_target()
    drafter = late_layers(target, (1, 3, 5), 0, layers=2, block_size=4)
    for mine, theirs in zip(drafter.layers, target.model.layers[-2:], strict=True):
        given = mine.state_dict()
        for name, weight in theirs.state_dict().items():
            assert torch.equal(given[name], weight), name
        # Inputs of independent channels, as the norm before leaves them: the root mean square of each query channel.
        rows = torch.randn(20_000, target.config.hidden_size) * theirs.input_layernorm.weight
        heads = (rows @ theirs.self_attn.q_proj.weight.T).view(len(rows), -1, drafter.config.head_dim)
        expected = heads.square().mean((0, 1)).sqrt()
        torch.testing.assert_close(given["self_attn.q_norm.weight"], expected, rtol=0.05, atol=0)


def test_groups_that_follow_one_another_share_one_loaded_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading takes longer than decoding a few prompts."""
    loaded, fails = [], {"b"}

    def train(what: str, words: list[str]) -> None:
        group = what.removeprefix("group ")
        run = tmp_path / f"runs/study/reduced/{group}/auf-0"
        if group not in fails:
            run.mkdir(parents=True)
            (run / "summary.json").write_text("{}")

    class Decoder:
        def __init__(self, target: str, *rest: object) -> None:
            loaded.append(target)

        def decode(self, run: Path) -> dict[str, object]:
            return {"benchmarks": {"p": {"accepted": [1], "cycles": [1]}}}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(studies_main, "_call", train)
    monkeypatch.setattr(studies_main, "Decoder", Decoder)
    monkeypatch.setattr(studies_main, "build_cache", lambda *_: None)
    monkeypatch.setattr(studies_main, "open_cache", lambda _: SimpleNamespace(manifest=SimpleNamespace(total_bytes=5)))
    study = replace(read_study("reduced"), groups=[Group(name, "demo", ["auf"], [0]) for name in "bac"])
    results = tmp_path / "results"
    assert studies_main.do_all(replace(study, groups=study.groups[:1]), results, [], 1) == ["b"]
    assert loaded == [], "nothing was trained that could be decoded"
    assert studies_main.do_all(study, results, [], 1) == ["b"]
    assert loaded == [study.target]
    assert json.loads((results / "c-auf-0.json").read_text())["group"] == "c"
