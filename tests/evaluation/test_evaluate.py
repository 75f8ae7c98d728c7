"""`specauf evaluate` and `specauf report` from end to end on a tiny target."""

import json
import shutil
import xml.etree.ElementTree as ET

import pytest
import torch
from safetensors.torch import load_file, save_file

from specauf.cli import main
from specauf.drafters import DFlashDrafter, TargetVocabulary
from specauf.errors import UserError
from specauf.evaluation import run as run_module
from specauf.evaluation.compare import compare, join
from specauf.evaluation.divergence import divergence, first_difference
from specauf.evaluation.report import comparison_lines
from specauf.evaluation.run import encode
from specauf.export import TargetFacts, export_speculators
from tests.builder.conftest import make_target, make_tokenizer
from tests.evaluation.conftest import command, record_of


@pytest.fixture(scope="module")
def evaluated(place, tmp_path_factory):
    """Two drafters, two temperatures, two block sizes: one run."""
    out = tmp_path_factory.mktemp("evaluated")
    assert main(command(place, out, "--temperatures=[0, 0.9]", "--block_sizes=[null, 3]")) == 0
    return out


def test_one_run_covers_drafters_settings_and_prompts(evaluated):
    record = record_of(evaluated)
    assert [p["benchmark"]["setting"] for p in record["parts"]] == [
        "greedy",
        "greedy, block 3",
        "T=0.9, rejection",
        "T=0.9, rejection, block 3",
    ]
    assert record["runs"] == record["parts"][0]["runs"]
    assert record["lossless"] is True
    for part in record["parts"]:
        assert set(part["runs"]) == {"first", "second"}
        slots = 2 if part["benchmark"]["block_size"] == 3 else 5
        for run in part["runs"].values():
            assert run["prompts"] == part["benchmark"]["prompts"] == 3
            assert len(run["accepted_per_slot"]) == len(run["conditional_acceptance"]) == slots
            assert run["tau_pooled"] == pytest.approx(1 + sum(run["accepted_per_slot"]))
            assert run["accepted_pooled"] == run["tau_pooled"] - 1
            # Drafting, verifying and the rest are all of the time.
            assert sum(run["milliseconds_per_token"].values()) == pytest.approx(1000 / run["tokens_per_second"])
            assert run["speedup"] == pytest.approx(run["tokens_per_second"] / run["baseline_tokens_per_second"])
        assert ("lossless" in part) == part["benchmark"]["setting"].startswith("greedy")


def test_an_interrupted_run_goes_on_and_ends_in_the_same_figures(place, tmp_path, monkeypatch):
    real, decoded = run_module.decode_prompt, []

    def interrupted(*args, **kwargs):
        if len(decoded) == 2:
            raise KeyboardInterrupt
        decoded.append(args[3].task_id)
        return real(*args, **kwargs)

    monkeypatch.setattr(run_module, "decode_prompt", interrupted)
    assert main(command(place, tmp_path)) == 130
    rows = tmp_path / "evaluation.jsonl"
    assert len(rows.read_text().splitlines()) == 2
    with rows.open("a") as file:
        file.write('{"half a li')  # as a killed process leaves it
    before = rows.read_bytes()
    words = [word.replace("/one", "/two") for word in command(place, tmp_path)]
    assert main(words) == 2
    assert rows.read_bytes() == before, "what is refused stays as it is"
    monkeypatch.setattr(run_module, "decode_prompt", real)
    assert main(command(place, tmp_path)) == 0
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [line["task_id"] for line in lines] == ["prompts/1", "prompts/2", "prompts/3"]
    # All is there: nothing is decoded a third time, and fewer prompts are a part of what is there.
    monkeypatch.setattr(run_module, "decode_prompt", None)
    monkeypatch.setattr(run_module, "_warm_up", None)
    before = record_of(tmp_path)["runs"]
    assert main(command(place, tmp_path)) == 0
    assert record_of(tmp_path)["runs"] == before
    assert main(command(place, tmp_path, "--limit=1")) == 0
    assert record_of(tmp_path)["runs"]["first"]["prompts"] == 1


def test_report_is_one_page_whose_figures_stand_in_the_json(evaluated, capsys):
    assert main(["report", str(evaluated)]) == 0
    record = json.loads((evaluated / "report.json").read_text())
    assert record["runs"] == record_of(evaluated)["runs"]
    markdown, html = ((evaluated / name).read_text() for name in ("report.md", "report.html"))
    for run in record["runs"].values():
        for page in (markdown, html):
            assert f"{run['tau_pooled']:.3f}" in page
            assert f"{run['tokens_per_second']:.1f}" in page
    assert "Lossless: every greedy answer" in markdown
    assert html.count("<svg") == 2 * len(record["parts"])
    # Self-contained: nothing that a browser would fetch.
    assert "<script" not in html
    assert "src=" not in html
    for number in range(len(record["parts"])):
        assert f"parts[{number}].runs.*" in html
    ET.fromstring(html[html.index("<svg") : html.index("</svg>") + 6])
    assert (evaluated / "report.png").stat().st_size > 10_000


def test_a_drafter_of_speculators_is_as_deep_as_its_target_is(place, tmp_path):
    target = make_target()
    facts = TargetFacts.from_config(target.config.to_dict(), "it", vocabulary=TargetVocabulary.from_target(target))
    export_speculators(DFlashDrafter.from_pretrained(place / "one"), tmp_path / "first", target=facts)
    file = tmp_path / "first" / "config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "num_target_layers"}))
    words = [a for a in command(place, tmp_path / "out") if not a.startswith(("first", "second"))]
    assert main([words[0], str(tmp_path / "first"), *words[1:]]) == 0
    assert record_of(tmp_path / "out")["lossless"] is True


def test_training_curves_come_into_the_report(place, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((place / "one" / name).read_bytes())
    # A run that was resumed at step 9: the log of before, whose last row was trained again; killed at step 29.
    (folder / "metrics-1.csv").write_text("step,train/support_ratio,val/tau\n4,0.3,\n14,0.9,\n")
    (folder / "metrics.csv").write_text(
        "step,train/support_ratio,val/tau\n9,0.1,\n14,0.4,\n19,0.2,\n19,,1.5\n24,,nan\n29,2e-"
    )
    arguments = [a for a in command(place, tmp_path / "out") if not a.startswith(("first", "second"))]
    assert main([arguments[0], f"mine={folder}", *arguments[1:]]) == 0
    curves = record_of(tmp_path / "out")["training"]["mine"]
    assert curves == {
        "train/support_ratio": {"step": [4, 9, 14, 19], "value": [0.3, 0.1, 0.4, 0.2]},
        "val/tau": {"step": [19], "value": [1.5]},
    }
    assert main(["report", str(tmp_path / "out")]) == 0
    assert "<h2>Training</h2>" in (tmp_path / "out" / "report.html").read_text()


def test_evaluations_made_apart_are_compared_in_pairs(place, tmp_path):
    outs = [tmp_path / name for name in ("a", "b")]
    for out, skip in zip(outs, ("second", "first"), strict=True):
        assert main([a for a in command(place, out) if not a.startswith(skip)]) == 0
    together = tmp_path / "both"
    assert main(["report", *map(str, outs), f"--out={together}"]) == 0
    record = json.loads((together / "report.json").read_text())
    assert list(record["runs"]) == ["first", "second"]
    assert record["comparisons"]["first/second"]["prompts"] == 3


def test_runs_of_one_name_keep_apart_and_only_shared_prompts_count():
    def run(tasks, accepted):
        sums = {"task_id": tasks, "digest": ["d"] * len(tasks), "accepted": accepted, "cycles": [10] * len(tasks)}
        return {"by_prompt": sums}

    pair = compare({"x": run(["1", "2", "3"], [10, 20, 90]), "y": run(["2", "1"], [10, 5])})["x/y"]
    assert pair["prompts"] == 2
    assert pair["tau_ratio"] == pytest.approx((1 + 30 / 20) / (1 + 15 / 20))
    assert compare({"x": run(["1"], [1]), "y": run(["2"], [1])}) == {}
    bench = {"name": "b", "setting": "greedy", "prompts": 1, "max_new_tokens": 5, "temperature": 0, "seed": 0}
    part = {"benchmark": bench, "runs": {"x": run(["1"], [5])}}
    where = {"date": "2026-11-26", "device": "CPU"}
    whole = {"target": "t", "dtype": "float32", "lossless": True, "runs": part["runs"], "parts": [part]}
    whole |= {"drafters": {"x": "digest"}, "environment": where, "cache": {"tokens": 9}}
    other = whole | {
        "drafters": {"x": "another"},
        "environment": where | {"date": "2026-11-27"},
        "cache": {"tokens": 8},
    }
    joined = join({"p": whole, "q": other})
    assert joined["drafters"] == {"p/x": "digest", "q/x": "another"}
    assert joined["environment"] == {"date": "2026-11-26 and 2026-11-27", "device": "CPU"}
    assert "cache" not in joined, "it would be that of some of them"
    assert join({"p": whole, "q": whole})["cache"] == {"tokens": 9}
    assert list(joined["runs"]) == ["p/x", "q/x"]
    assert joined["comparisons"]["p/x/q/x"]["tau_ratio_95"] == (1.0, 1.0)
    (line,) = comparison_lines(joined["parts"][0])
    assert line.startswith("Emitted length p/x over q/x: +0.0%")
    reseeded = whole | {"parts": [part | {"benchmark": bench | {"seed": 1}}]}
    assert list(join({"p": whole, "q": reseeded})["runs"]) == ["p/x", "q/x"], "greedy decoding draws nothing"
    longer = whole | {"parts": [part | {"benchmark": bench | {"max_new_tokens": 9}}]}
    for other, says in (
        (longer, "max_new_tokens: 5 in p, 9 in q; report runs of one max_new_tokens together"),
        (whole | {"dtype": "bfloat16"}, "dtype: float32 in p, bfloat16 in q"),
        (whole | {"target": "u"}, "target: t in p, u in q"),
        (whole | {"environment": where | {"device": "H100"}}, "device: CPU in p, H100 in q"),
    ):
        with pytest.raises(UserError, match=says):
            join({"p": whole, "q": other})


def test_prompts_of_one_name_and_other_text_are_no_pair():
    sums = {"task_id": ["p/1", "p/2"], "digest": ["a", "b"], "accepted": [5, 6], "cycles": [10, 10]}
    other = sums | {"digest": ["a", "c"], "accepted": [10, 0]}
    assert compare({"x": {"by_prompt": sums}, "y": {"by_prompt": other}})["x/y"]["prompts"] == 1


def test_a_prompt_that_ends_with_its_first_token_is_no_pair():
    sums = {"task_id": ["p/1", "p/2"], "digest": ["a", "b"], "accepted": [5, 0], "cycles": [10, 0]}
    other = sums | {"accepted": [10, 20], "cycles": [10, 10]}
    found = compare({"x": {"by_prompt": sums}, "y": {"by_prompt": other}})["x/y"]
    assert found == {"tau_ratio": 0.75, "tau_ratio_95": (0.75, 0.75), "prompts": 1, "other_tokens": None}
    alone = {name: {"by_prompt": {k: v[1:] for k, v in s.items()}} for name, s in (("x", sums), ("y", sums))}
    assert compare(alone) == {}


def test_prompts_draw_other_random_numbers_and_drafters_the_same(place, tmp_path, monkeypatch):
    """Were they the same for all prompts, the bootstrap over prompts would not see what they share."""
    seeds, real = {}, run_module.speculative_generate

    def generate(target, drafter, ids, **options):
        if "generator" in options:
            seeds.setdefault(tuple(ids[0].tolist()), []).append(options["generator"].initial_seed())
        return real(target, drafter, ids, **options)

    monkeypatch.setattr(run_module, "speculative_generate", generate)
    assert main(command(place, tmp_path / "a", "--temperatures=[1.0]")) == 0
    assert [len(found) for found in seeds.values()] == [3, 3, 3]  # plain decoding and two drafters
    assert all(len(set(found)) == 1 for found in seeds.values())
    first = {found[0] for found in seeds.values()}
    assert len(first) == 3
    seeds.clear()
    assert main(command(place, tmp_path / "b", "--temperatures=[1.0]", "--seed=1")) == 0
    assert not first & {found[0] for found in seeds.values()}


def test_the_chat_template_gets_the_targets_options(place, tmp_path, monkeypatch):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if enable_thinking is false %}<none>{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "target")
    make_target().save_pretrained(tmp_path / "target")
    plain, none = (encode(tokenizer, "hi", options) for options in ({}, {"enable_thinking": False}))
    assert tokenizer.decode(plain[0]) == "hi"
    assert tokenizer.decode(none[0]) == "hi<none>"
    yaml = "target:\n  model: {}\n  dtype: float32\n  template_options: {{enable_thinking: {}}}\n"
    lengths = []
    for thinking in ("true", "false"):
        (tmp_path / "tiny.yaml").write_text(yaml.format(tmp_path / "target", thinking))
        options = (f"--target={tmp_path}/tiny.yaml", "--limit=1")
        assert main(command(place, tmp_path / thinking, *options)) == 0
        lengths.append(json.loads((tmp_path / thinking / "evaluation.jsonl").read_text())["prompt_tokens"])
    assert lengths[1] == lengths[0] + len(tokenizer("<none>")["input_ids"])
    # The same file may not go on with the other template.
    assert main(command(place, tmp_path / "true", *options)) == 2
    # A report of both pairs what is one text and another prompt, and says so where it is one.
    monkeypatch.chdir(tmp_path)
    assert main(["report", "true", "false", "--out=both"]) == 0
    page = (tmp_path / "both/report.md").read_text()
    across, within = (page.count(f"one prompt, no interval{said}") for said in (", 1 laid out otherwise", ")."))
    assert (across, within) == (2, 1)


def test_processors_of_the_generation_config_are_left_out_and_named(place, tmp_path, capsys):
    target = make_target()
    target.generation_config.repetition_penalty = 1.5
    target.save_pretrained(tmp_path / "target")
    make_tokenizer().save_pretrained(tmp_path / "target")
    assert main(command(place, tmp_path / "out", f"--target={tmp_path}/target", "--limit=1", "--json=-")) == 0
    out, err = capsys.readouterr()
    assert "note: repetition_penalty 1.5 of the target's generation_config left out" in err
    assert json.loads(out)["lossless"] is True


def test_rows_of_a_target_whose_weights_changed_are_refused(place, tmp_path, capsys):
    shutil.copytree(place / "target", tmp_path / "target")
    words = command(place, tmp_path / "out", f"--target={tmp_path}/target", "--limit=1")
    assert main(words) == 0
    weights = load_file(tmp_path / "target/model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, tmp_path / "target/model.safetensors", metadata={"format": "pt"})
    assert main(words) == 2
    assert "holds results of another target" in capsys.readouterr().err


def test_answers_of_one_token_are_left_out_of_intervals_and_refused_alone(place, tmp_path, capsys):
    """A target whose every answer ends at once has nothing to draft."""
    target = make_target()
    target.generation_config.eos_token_id = list(range(target.config.vocab_size))
    target.save_pretrained(tmp_path / "target")
    make_tokenizer().save_pretrained(tmp_path / "target")
    assert main(command(place, tmp_path / "out", f"--target={tmp_path}/target")) == 2
    assert "all 3 answers end with their first token" in capsys.readouterr().err


def test_divergence_finds_the_place_and_the_gap():
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2], [1, 2, 3]) == 2
    target, ids = make_target(), torch.arange(5)[None]
    plain = target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)[0, 5:].tolist()
    assert divergence(target, ids, plain, plain) is None
    other = [*plain[:3], (plain[3] + 1) % 256, *plain[4:]]
    logits = target(torch.cat([ids, torch.tensor([plain[:3]])], 1)).logits[0, -1]
    found = divergence(target, ids, other, plain)
    assert (found["position"], found["expected"], found["found"]) == (3, plain[3], other[3])
    assert found["logit_gap"] == pytest.approx(float(logits[plain[3]] - logits[other[3]]), rel=1e-4)
    assert found["near_tie"] is False
    assert divergence(target, ids, plain[:4], plain)["logit_gap"] is None


def test_a_divergence_of_rounding_alone_is_a_near_tie():
    class Tied:
        dtype = torch.bfloat16

        def __call__(self, tokens, logits_to_keep):
            logits = torch.full((1, 1, 4), -9.0)
            logits[0, 0, 1:3] = torch.tensor([20.0, 20.125])  # one unit in the last place of bfloat16 here
            return type("Out", (), {"logits": logits.bfloat16()})

    assert divergence(Tied(), torch.zeros(1, 2, dtype=torch.long), [1], [2])["near_tie"] is True


def test_bf16_answers_that_differ_are_reported(place, tmp_path):
    """Whatever bf16 does on this machine, every answer that is not plain decoding's stands in the record."""
    assert main(command(place, tmp_path, "--dtype=bfloat16", "--limit=2")) == 0
    record = record_of(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "evaluation.jsonl").read_text().splitlines()]
    different = sum(not d["identical"] for row in rows for d in (row["plain"], *row["drafters"].values()))
    assert record["dtype"] == "bfloat16"
    assert len(record["divergences"]) == different
    assert record["lossless"] == (different == 0)
