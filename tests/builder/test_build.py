"""Whole builds on a tiny target: what is stored, what is dropped, resuming, and mistakes in one line."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from cache_builder.config import BUILD, BuildConfig, read_told
from cache_builder.driver import build
from cache_builder.inspect import build_summary
from cache_builder.target import Target
from specauf.cache import open_cache, verify
from specauf.errors import UserError
from specauf.targets import TargetConfig
from tests.builder.conftest import digests, make_target, make_tokenizer, write_jsonl


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    rows = [{"messages": [{"role": "user", "content": f"question number {i} " + "x" * (i % 7)}]} for i in range(40)]
    return write_jsonl(tmp_path / "corpus.jsonl", rows)


def config(tiny: Path, documents: Path, out: Path, **changes: Any) -> BuildConfig:
    target = TargetConfig(name="tiny", model=str(tiny), dtype="float32", taps=(1, 3, 5), mask_token="<|mask|>")
    settings: dict[str, Any] = {
        "target": target, "corpus": str(documents), "out": str(out), "max_length": 160, "max_new_tokens": 12,
        "batch_size": 8, "documents_per_shard": 16, "k": 4, "features": "bf16", "held_out": 0.2, "accelerator": "cpu",
        "max_compression": 20.0,
    }  # fmt: skip
    return BuildConfig(**settings | changes)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {
                "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
                "max_position_embeddings": 64,
            },
            "changes its rotary frequencies .* beyond 64 tokens",
        ),
        ({"vocab_size": 260}, "the tokenizer gives id 269, target tiny has embeddings for 260"),
    ],
)
def test_a_target_that_could_not_read_what_it_gets_is_refused(
    changes: dict[str, Any], says: str, tiny_target_dir: Path, corpus: Path, tmp_path: Path
) -> None:
    make_target(eos_token_id=1, **changes).save_pretrained(tiny_target_dir)
    settings = config(tiny_target_dir, corpus, tmp_path / "cache")
    settings = replace(settings, target=replace(settings.target, mask_token=258))
    with pytest.raises(UserError, match=says):
        build(settings)
    if "rope_parameters" in changes:
        assert build(replace(settings, max_length=64)) is not None


def test_learned_positions_are_as_many_as_they_are() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=270, n_embd=32, n_layer=8, n_head=4, n_positions=64)).eval()
    settings = TargetConfig(name="gpt2", model="gpt2", taps=(1, 3), mask_token=258)
    target = Target(model, make_tokenizer(), settings, k=4)
    target.require_positions(64)
    with pytest.raises(UserError, match="max_length is 65, target gpt2 has 64 positions"):
        target.require_positions(65)


def test_prompts_that_hold_the_mask_token_are_not_answered(tiny_target_dir: Path, corpus: Path, tmp_path: Path) -> None:
    settings = config(tiny_target_dir, corpus, tmp_path / "cache")
    settings = replace(settings, target=replace(settings.target, mask_token="<|im_start|>"))
    with (
        mock.patch("cache_builder.documents.answer_all", side_effect=AssertionError),
        pytest.raises(UserError, match=r"no document is left \(40 mask_token\)"),
    ):
        build(settings)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"max_new_tokens": 2}, "max_new_tokens is 2, min_answer_tokens is 4"),
        ({"temperature": 1e-9, "sample_top_k": 4}, "temperature is 1e-09, expected at least 0.001"),
        ({"temperature": 1.0, "sample_top_k": 4, "seed": 2**64}, f"seed is {2**64}, expected 0 to"),
    ],
)
def test_settings_that_no_answer_could_come_of(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(says)):
        config(tmp_path, tmp_path, tmp_path, **changes)


def test_a_build_stores_what_a_forward_pass_gives(tiny_target_dir: Path, corpus: Path, tmp_path: Path) -> None:
    manifest = build(config(tiny_target_dir, corpus, tmp_path / "cache"))
    assert manifest is not None
    cache = open_cache(str(tmp_path / "cache"))
    assert verify(cache) == []
    assert cache.num_shards == 3
    assert manifest.counts.documents == 40
    assert 0 < manifest.counts.held_out_documents < 40
    assert manifest.identity.regeneration["greedy"] is True
    assert manifest.counts.argmax_is_data == 1.0
    from specauf.targets import load_target

    model, tokenizer = load_target(config(tiny_target_dir, corpus, tmp_path).target)
    for number in (0, 17, 39):
        document = cache.document(number)
        text = tokenizer.decode(document.tokens[~document.loss_mask])
        assert f"question number {number} " in text
        with torch.no_grad():
            whole = model(torch.from_numpy(document.tokens)[None], output_hidden_states=True)
        expected = torch.cat([whole.hidden_states[t + 1][0] for t in (1, 3, 5)], -1)
        assert document.features is not None
        np.testing.assert_allclose(document.features, expected.numpy(), rtol=2e-2, atol=2e-2)
        logprobs = whole.logits[0].log_softmax(-1).numpy()[document.row_index]
        exact = np.take_along_axis(logprobs, document.topk_ids, -1)
        np.testing.assert_allclose(np.exp(document.topk_logprobs), np.exp(exact), atol=2e-2)
        assert (document.tokens[document.row_index + 1] == document.topk_ids[:, 0]).all()
        assert document.loss_mask[document.row_index + 1].all()


@pytest.mark.parametrize("features", ["none", "int8", "sketch"])
def test_every_kind_of_features_builds_and_verifies(
    tiny_target_dir: Path, corpus: Path, tmp_path: Path, features: Any
) -> None:
    manifest = build(config(tiny_target_dir, corpus, tmp_path / "cache", features=features, sketch_rank=16))
    assert manifest is not None
    assert manifest.identity.features == features
    assert verify(open_cache(str(tmp_path / "cache"))) == []


def test_the_same_build_twice_gives_the_same_bytes(tiny_target_dir: Path, corpus: Path, tmp_path: Path) -> None:
    build(config(tiny_target_dir, corpus, tmp_path / "a", features="sketch", sketch_rank=8))
    build(config(tiny_target_dir, corpus, tmp_path / "b", features="sketch", sketch_rank=8))
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_a_finished_build_run_again_changes_nothing(tiny_target_dir: Path, corpus: Path, tmp_path: Path) -> None:
    build(config(tiny_target_dir, corpus, tmp_path / "cache"))
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("shard-*")}
    build(config(tiny_target_dir, corpus, tmp_path / "cache"))
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("shard-*")}


@pytest.mark.parametrize(
    "gone", ["shard-00000.json", "shard-00001.json", "shard-00002.json", "manifest.json", "target.json"]
)
def test_an_unfinished_build_goes_on_to_the_same_bytes(
    tiny_target_dir: Path, corpus: Path, tmp_path: Path, gone: str
) -> None:
    build(config(tiny_target_dir, corpus, tmp_path / "cache", features="int8"))
    whole = digests(tmp_path / "cache")
    (tmp_path / "cache" / gone).unlink()
    build(config(tiny_target_dir, corpus, tmp_path / "cache", features="int8"))
    assert digests(tmp_path / "cache") == whole


def test_another_setting_on_the_same_directory_is_refused(tiny_target_dir: Path, corpus: Path, tmp_path: Path) -> None:
    build(config(tiny_target_dir, corpus, tmp_path / "cache"))
    with pytest.raises(UserError, match="k is 4, this build has 5"):
        build(config(tiny_target_dir, corpus, tmp_path / "cache", k=5))
    with pytest.raises(UserError, match=r"regeneration.max_new_tokens is 12, this build has 10"):
        build(config(tiny_target_dir, corpus, tmp_path / "cache", max_new_tokens=10))


def test_given_answers_are_kept_and_only_they_are_supervised(tiny_target_dir: Path, tmp_path: Path) -> None:
    rows = [
        {
            "messages": [
                {"role": r, "content": f"{r} says {i} things"} for r in ("user", "assistant", "user", "assistant")
            ]
        }
        for i in range(20)
    ]
    corpus = write_jsonl(tmp_path / "chats.jsonl", rows)
    manifest = build(config(tiny_target_dir, corpus, tmp_path / "cache", regenerate=False, max_length=300))
    assert manifest is not None
    assert manifest.identity.regeneration == {}
    cache = open_cache(str(tmp_path / "cache"))
    assert verify(cache) == []
    from specauf.targets import load_target

    model, tokenizer = load_target(config(tiny_target_dir, corpus, tmp_path).target)
    document = cache.document(7)
    assert tokenizer.decode(document.tokens[document.loss_mask]) == "assistant says 7 things<|im_end|>" * 2
    logprobs = model(torch.from_numpy(document.tokens)[None]).logits[0].log_softmax(-1).detach().numpy()
    exact = np.take_along_axis(logprobs[document.row_index], document.topk_ids, -1)
    np.testing.assert_allclose(np.exp(document.topk_logprobs), np.exp(exact), atol=2e-2)
    np.testing.assert_array_equal(document.topk_ids[:, 0], logprobs[document.row_index].argmax(-1))


def test_drops_are_counted_by_reason(tiny_target_dir: Path, tmp_path: Path) -> None:
    good = [{"prompt": f"tell {i}", "response": f"the answer is {i} and some more"} for i in range(12)]
    bad = [
        {"prompt": "tell 3", "response": "the answer is 3 and some more"},
        {"prompt": "   ", "response": "an answer to nothing"},
        {"prompt": "silence", "response": "  "},
        {"prompt": "brief", "response": "a"},
        {"prompt": "long", "response": "word " * 100},
        {"prompt": "loop", "response": "ha" * 60},
        {"prompt": "mask", "response": "here is <|mask|> in it"},
    ]
    corpus = write_jsonl(tmp_path / "pairs.jsonl", good + bad)
    changes: dict[str, Any] = {"regenerate": False, "documents_per_shard": 40, "max_compression": 3.0}
    manifest = build(config(tiny_target_dir, corpus, tmp_path / "cache", **changes))
    assert manifest is not None
    assert manifest.counts.documents == 12
    assert manifest.drops == {"duplicate": 1, "empty": 2, "too_short": 1, "over_long": 1, "looping": 1, "mask_token": 1}


def test_the_split_follows_the_question_not_the_order(tiny_target_dir: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"question {i}"} for i in range(30)]
    held_out = []
    for name, some in (("a", rows), ("b", rows[::-1])):
        corpus = write_jsonl(tmp_path / f"{name}.jsonl", some)
        build(config(tiny_target_dir, corpus, tmp_path / name, features="none"))
        cache = open_cache(str(tmp_path / name))
        held_out.append({d.tokens[~d.loss_mask].tobytes() for d in cache.documents(split="held_out")})
    assert held_out[0] == held_out[1]
    assert held_out[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k is 0, expected 1 or more"),
        ({"held_out": 1.5}, "held_out is 1.5"),
        ({"max_new_tokens": 200}, "max_new_tokens is 200, max_length is 160"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": 1.0, "sample_top_k": 9}, "sample_top_k is 9"),
        ({"k": 10_000}, "k is 10000, the target's vocabulary has"),
        ({"corpus": "/nowhere/corpus.jsonl"}, "does not exist"),
        ({"corpus": "python-stdlip"}, "Did you mean python-stdlib"),
        ({"features": "sketch", "sketch_rank": 97}, "sketch_rank is 97, 3 taps of 32 channels allow 1 to 96: set"),
        ({"features": "sketch", "fit_tokens": 20}, "sketch_rank is 32, fit_tokens is 20.*or raise --fit_tokens"),
        (
            {"features": "sketch", "sketch_rank": 96, "max_documents": 1, "min_answer_tokens": 1},
            "sketch_rank is 96, .* allow 1 to .*: lower --sketch_rank, or give more documents or --features=int8",
        ),
    ],
)
def test_a_bad_setting_is_one_line(
    tiny_target_dir: Path, corpus: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build(config(tiny_target_dir, corpus, tmp_path / "cache", **change))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache").exists() or list((tmp_path / "cache").iterdir())


def test_a_build_that_ended_before_it_stored_anything_may_have_other_settings(
    tiny_target_dir: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = {"features": "sketch", "max_documents": 1, "min_answer_tokens": 1, "held_out": 0.001}
    with pytest.raises(UserError, match="lower --sketch_rank"):
        build(config(tiny_target_dir, corpus, tmp_path / "cache", sketch_rank=96, **few))
    assert "note: none of 1 documents is held out" in capsys.readouterr().err
    manifest = build(config(tiny_target_dir, corpus, tmp_path / "cache", sketch_rank=8, **few))
    assert manifest is not None
    assert build_summary("c", manifest).endswith("next: specauf fit, with --data.cache=c --data.validate_on=train")
    assert read_told((tmp_path / "cache" / BUILD).read_bytes(), "c").sketch_rank == 8
    assert verify(open_cache(str(tmp_path / "cache"))) == []
    with pytest.raises(UserError, match="sketch_rank is 8, this build has 9"):
        build(config(tiny_target_dir, corpus, tmp_path / "cache", sketch_rank=9, **few))


def test_out_that_is_a_file_is_refused(tiny_target_dir: Path, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("mine")
    with pytest.raises(UserError, match="is a file, expected a directory"):
        build(config(tiny_target_dir, corpus, tmp_path / "cache"))


def test_text_is_not_a_question(tiny_target_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("first paragraph of words\n\nsecond paragraph\nof more words\n")
    with pytest.raises(UserError, match=r"plain text.*--regenerate=false"):
        build(config(tiny_target_dir, path, tmp_path / "cache"))
    manifest = build(config(tiny_target_dir, path, tmp_path / "cache", regenerate=False))
    assert manifest is not None
    assert manifest.counts.documents == 2
    assert manifest.counts.supervised_tokens == manifest.counts.tokens - 2


def test_a_build_can_be_read_off_its_cache(tiny_target_dir: Path, corpus: Path, tmp_path: Path) -> None:
    for name, changes in (("a", {}), ("b", {"temperature": 0.7, "sample_top_k": 3}), ("c", {"keep_mass": 0.5})):
        settings = config(tiny_target_dir, corpus, tmp_path / name, max_documents=20, **changes)
        manifest = build(settings)
        again = read_told((tmp_path / name / BUILD).read_bytes(), str(tmp_path / name), accelerator="cpu")
        assert again == settings
        assert build(again) == manifest


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"target": {}}', b'{"target": {"taps": null}, "colour": 1}'])
def test_a_damaged_note_is_one_line(data: bytes) -> None:
    with pytest.raises(UserError, match=r"cannot be read|give either"):
        read_told(data, "cache")


@pytest.mark.parametrize("share", [0.0, -0.1, 1.5, float("nan")])
def test_every_row_keeps_an_entry(tiny_target_dir: Path, corpus: Path, tmp_path: Path, share: float) -> None:
    with pytest.raises(UserError, match=f"keep_mass is {share}, expected a share above 0, up to 1: set --keep_mass"):
        config(tiny_target_dir, corpus, tmp_path / "cache", keep_mass=share)


@pytest.mark.parametrize("regenerate", [True, False])
def test_rows_that_the_template_refuses_are_counted_under_that_reason_alone(
    tiny_target_dir: Path, tmp_path: Path, regenerate: bool
) -> None:
    template = make_tokenizer().chat_template
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    make_tokenizer(refuses + template).save_pretrained(tiny_target_dir)
    rows: list[dict[str, str]] = [{"prompt": f"tell {i}", "response": f"the answer is {i}, and more"} for i in range(8)]
    rows[3]["system"] = "Be brief."
    corpus = write_jsonl(tmp_path / "pairs.jsonl", rows)
    manifest = build(config(tiny_target_dir, corpus, tmp_path / "cache", regenerate=regenerate, min_answer_tokens=1))
    assert manifest is not None
    assert manifest.drops == {"template": 1}


def test_a_chat_behind_plain_text_needs_a_template(tiny_target_dir: Path, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tiny_target_dir)
    (tiny_target_dir / "chat_template.jinja").unlink(missing_ok=True)
    turns = [{"role": r, "content": f"{r} says things"} for r in ("user", "assistant")]
    corpus = write_jsonl(tmp_path / "mixed.jsonl", [{"text": "some plain words"}, {"messages": turns}])
    with pytest.raises(UserError, match="no chat template: use an instruct model") as caught:
        build(config(tiny_target_dir, corpus, tmp_path / "cache", regenerate=False, features="none"))
    assert "\n" not in str(caught.value)


def test_a_build_is_the_same_with_and_without_the_hub_in_reach(
    tiny_target_dir: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers keeps in the tokenizer's config whether it was told to load local files only."""
    found = []
    for name, offline in (("online", False), ("offline", True)):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        build(config(tiny_target_dir, corpus, tmp_path / name, max_documents=8))
        found.append(digests(tmp_path / name))
    assert found[0] == found[1]
