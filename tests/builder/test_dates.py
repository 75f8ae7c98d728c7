"""A template that prints today's date: a cache's prompts name one day, whenever they are made."""

import datetime
import json
from pathlib import Path
from typing import Any

import pytest

from cache_builder.builder import open_build
from cache_builder.chat import ChatRenderer
from cache_builder.cli import main
from cache_builder.config import BuildConfig
from cache_builder.driver import build
from cache_builder.repair import repair
from specauf.cache import open_cache
from specauf.cache.schema import Identity, from_json, to_json
from specauf.errors import UserError
from specauf.targets import load_tokenizer
from specauf.template_dates import dated_template
from tests.builder.conftest import CHATML, digests, make_tokenizer, write_jsonl
from tests.builder.test_build import config
from tests.builder.test_chat import chat

# As Llama 3.2's and SmolLM3's.
DATED = (
    "{# strftime_now is transformers' #}{% if not date_string is defined %}{% if strftime_now is defined %}"
    '{% set date_string = strftime_now("%d %b %Y") %}{% else %}{% set date_string = "26 Jul 2024" %}{% endif %}'
    "{% endif %}<|im_start|>system\nToday Date: {{ date_string }}<|im_end|>\n" + CHATML
)
FIRST, SECOND = datetime.date(2026, 11, 26), datetime.date(2026, 11, 27)


class Calendar:
    """Says which day it is, to the builder and to transformers."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        class Clock(datetime.datetime):
            @classmethod
            def now(cls, tz: Any = None) -> "Clock":
                return cls.combine(self.day, datetime.time(12), tz)

        self.day = FIRST
        patch.setattr("cache_builder.dates.today", lambda: self.day)
        patch.setattr("transformers.utils.chat_template_utils.datetime", Clock)


@pytest.fixture
def calendar(monkeypatch: pytest.MonkeyPatch) -> Calendar:
    return Calendar(monkeypatch)


@pytest.fixture
def settings(tiny_target_dir: Path, tmp_path: Path) -> BuildConfig:
    make_tokenizer(DATED).save_pretrained(tiny_target_dir)
    rows = [{"prompt": f"question number {i}", "response": f"the answer is {i}"} for i in range(6)]
    corpus = write_jsonl(tmp_path / "corpus.jsonl", rows)
    return config(tiny_target_dir, corpus, tmp_path / "cache", documents_per_shard=2)


def days(settings: BuildConfig) -> set[str]:
    """What the prompts of a cache say that today is."""
    tokenizer = load_tokenizer(settings.target)
    texts = [tokenizer.decode(d.tokens) for d in open_cache(settings.out).documents()]
    return {text.split("Today Date: ")[1].split("<")[0] for text in texts}


def test_a_build_that_goes_on_another_day_ends_in_the_same_bytes(
    settings: BuildConfig, calendar: Calendar, tmp_path: Path
) -> None:
    build(settings)
    whole = digests(tmp_path / "cache")
    for name in ("manifest.json", "shard-00001.json", "shard-00002.json"):
        (tmp_path / "cache" / name).unlink()
    calendar.day = SECOND
    build(settings)
    assert digests(tmp_path / "cache") == whole
    assert days(settings) == {"26 Nov 2026"}


def test_a_repair_on_another_day_keeps_the_fingerprint(
    settings: BuildConfig, calendar: Calendar, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(settings)
    whole = digests(tmp_path / "cache")
    calendar.day = SECOND
    for victim in ("shard-00001.zarr/tokens/c/0", "manifest.json"):
        (tmp_path / "cache" / victim).write_bytes(b"x")
        assert repair(settings.out, "cpu").problems == []
        assert digests(tmp_path / "cache") == whole
    assert main(["inspect", settings.out]) == 0
    assert "prompts dated 2026-11-26" in capsys.readouterr().out


def test_the_identity_holds_the_day_of_a_new_cache_and_only_where_it_is_asked_for(
    settings: BuildConfig, calendar: Calendar, tiny_target_dir: Path
) -> None:
    calendar.day = SECOND
    dated = open_build(settings).identity
    assert dated.corpus["template_date"] == "2026-11-27"
    make_tokenizer().save_pretrained(tiny_target_dir)
    plain = open_build(settings).identity
    assert dated.corpus.keys() - plain.corpus.keys() == {"template_date"}


def test_a_cache_without_a_date_goes_on_and_says_so(
    settings: BuildConfig, calendar: Calendar, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As an earlier release began it."""
    begun = open_build(settings).identity
    del begun.corpus["template_date"]
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/identity.json").write_bytes(to_json(begun))
    calendar.day = SECOND
    build(settings)
    assert "was begun by a release that did not keep the date" in capsys.readouterr().err
    assert days(settings) == {"27 Nov 2026"}
    assert from_json(Identity, (tmp_path / "cache/identity.json").read_bytes(), "identity.json") == begun


def test_ranks_that_start_on_two_days_do_not_share_a_cache(settings: BuildConfig, calendar: Calendar) -> None:
    first = open_build(settings)
    calendar.day = SECOND
    late = open_build(settings)
    first.claim()
    first.require_begun()
    with pytest.raises(UserError, match=r"corpus.template_date '2026-11-26', this rank has '2026-11-27': run the same"):
        late.require_begun()
    open_build(settings).require_begun()


def test_given_answers_are_rendered_with_the_caches_date(settings: BuildConfig, calendar: Calendar) -> None:
    tokenizer: Any = make_tokenizer(DATED)
    render = ChatRenderer(tokenizer, frozenset({tokenizer.eos_token_id}), {}, SECOND)
    ids, mask = render.document(chat("why?", "because"))
    assert "Today Date: 27 Nov 2026<" in tokenizer.decode(ids)
    assert tokenizer.decode(ids[mask]) == "because<|im_end|>"
    prompt = render.prompt_ids(chat("why?", "because"))
    assert ids[: len(prompt)].tolist() == prompt.tolist()


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ strftime_now('%Y-%m-%d') }}", "2026-11-26"),
        ('{{ strftime_now(format = "%H:%M, %A") }}', "00:00, Thursday"),
        ("{{ 'a' + strftime_now( '%B' ) + strftime_now ('%y') }}", "aNovember26"),
        ("{% macro d() %}{{ strftime_now('%d') }}{% endmacro %}{{ d() }}", "26"),
        ("{% if strftime_now is not defined %}never{% endif %}", ""),
        ("no date", "no date"),
    ],
)
def test_every_call_prints_the_date(template: str, says: str, calendar: Calendar) -> None:
    calendar.day = SECOND
    tokenizer: Any = make_tokenizer(template)
    text = ChatRenderer(tokenizer, frozenset(), {}, FIRST).render(chat("why?").messages, answer=True)
    assert text == says


@pytest.mark.parametrize(
    "template", ["{% set f = '%d' %}{{ strftime_now(f) }}", "{% set now = strftime_now %}{{ now('%d') }}"]
)
def test_a_date_that_cannot_be_held_is_one_line(template: str, settings: BuildConfig, tiny_target_dir: Path) -> None:
    with pytest.raises(UserError, match="chat template uses strftime_now otherwise than as"):
        dated_template(template, FIRST)
    make_tokenizer(template + CHATML).save_pretrained(tiny_target_dir)
    with pytest.raises(UserError, match="chat template uses strftime_now otherwise than as"):
        build(settings)


def test_a_date_that_is_none_is_one_line(settings: BuildConfig, calendar: Calendar, tmp_path: Path) -> None:
    open_build(settings).claim()
    begun = json.loads((tmp_path / "cache/identity.json").read_text())
    begun["corpus"]["template_date"] = "yesterday"
    (tmp_path / "cache/identity.json").write_text(json.dumps(begun))
    with pytest.raises(UserError, match=r"corpus.template_date is 'yesterday', expected a date"):
        build(settings)
