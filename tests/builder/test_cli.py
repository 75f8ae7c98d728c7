"""The command line: options, one-line errors, estimate, inspect, verify and repair."""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from transformers import AutoTokenizer

from cache_builder.cli import main
from cache_builder.commands import parse_build
from specauf.configs import known_configs
from specauf.errors import UserError
from tests.builder.conftest import digests, write_jsonl
from tests.processes import afresh


@pytest.fixture
def words(tiny_target_dir: Path, tmp_path: Path) -> list[str]:
    rows = [{"prompt": f"question number {i}"} for i in range(24)]
    corpus = write_jsonl(tmp_path / "corpus.jsonl", rows)
    target = {
        "name": "tiny",
        "model": str(tiny_target_dir),
        "dtype": "float32",
        "taps": [1, 3, 5],
        "mask_token": "<|mask|>",
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({"target": target}))
    return [
        f"--config={tmp_path / 'tiny.yaml'}", "--corpus", str(corpus), "--out", str(tmp_path / "cache"),
        "--max-length=120", "--max_new_tokens", "10", "--documents-per-shard=8", "--k=4", "--features=bf16",
        "--max-compression=20", "--accelerator=cpu",
    ]  # fmt: skip


def test_build_inspect_and_verify(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", *words]) == 0
    assert "24 documents" in capsys.readouterr().out
    cache = str(tmp_path / "cache")
    assert main(["inspect", cache]) == 0
    text = capsys.readouterr().out
    assert "question number" in text
    assert "retained mass" in text
    with mock.patch("transformers.AutoTokenizer.from_pretrained", wraps=AutoTokenizer.from_pretrained) as loaded:
        assert main(["inspect", cache, "--sample=3"]) == 0
        assert capsys.readouterr().out.count("most probable next tokens") == 3
        assert main(["inspect", cache, "--json", "-"]) == 0
    assert loaded.call_count == 1
    figures = json.loads(capsys.readouterr().out)
    assert figures.keys() >= {
        "identity", "documents", "tokens", "supervised_tokens", "fields", "topk_bytes_per_supervised_token",
        "head_mass", "argmax_is_data", "drops",
    }  # fmt: skip
    assert figures["topk_bytes_per_supervised_token"] > 0
    types = {name: field["dtype"] for name, field in figures["fields"].items()}
    assert (types["loss_mask"], types["features"], types["head_mass"]) == ("bool", "uint16", "int16")
    assert set(figures["head_mass"]) == {"mean", "p10", "min"}
    assert 0 < figures["head_mass"]["min"] <= figures["head_mass"]["p10"] <= 1
    assert {"bytes", "bytes_per_row", "dtype"} <= set(figures["fields"]["features"])
    assert main(["verify", "--cache", cache, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "cache": cache, "shards": 3, "problems": [], "repaired": [], "removed": [],
    }  # fmt: skip


@pytest.mark.parametrize(
    "victim", ["shard-00001.zarr/tokens/c/0", "shard-00002.json", "manifest.json", "target/weights.safetensors"]
)
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_repair_builds_just_the_bad_parts(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], victim: str, damage: str
) -> None:
    main(["build", *words])
    cache = tmp_path / "cache"
    whole = digests(cache)
    path, data = cache / victim, (cache / victim).read_bytes()
    middle = len(data) // 2
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(
            data[:middle] if damage == "cut" else data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        )
    before = {p: p.stat().st_mtime_ns for p in cache.rglob("c/*")}
    capsys.readouterr()
    assert main(["verify", str(cache)]) == 2
    assert victim.split(".")[0].split("/")[0] in capsys.readouterr().err + victim
    assert main(["verify", str(cache), "--repair", "--accelerator=cpu"]) == 0
    assert digests(cache) == whole
    assert main(["verify", str(cache)]) == 0
    if victim.startswith("shard"):
        untouched = [p for p in before if p.is_relative_to(cache / "shard-00000.zarr")]
        assert untouched
        assert all(p.stat().st_mtime_ns == before[p] for p in untouched)


def test_estimate_is_near_the_build(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", *words, "--json", "-", "--sample=12"]) == 0
    guess = json.loads(capsys.readouterr().out)
    assert not (tmp_path / "cache").exists()
    main(["build", *words, f"--json={tmp_path / 'built.json'}"])
    built = json.loads((tmp_path / "built.json").read_text())
    assert guess["documents"] == 24
    assert guess["tokens"] == pytest.approx(built["tokens"], rel=0.2)
    assert guess["field_bytes"]["features"] == pytest.approx(built["fields"]["features"]["bytes"], rel=0.25)
    at = words.index("--out")
    assert main(["estimate", *words[:at], *words[at + 2 :]]) == 0
    assert "DeepSpec's layout" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--colour=red"], "colour"),
        (["--k=many"], "k"),
        (["--features=int4"], "int4"),
        (["--k=0"], "k is 0, expected 1 or more"),
        (["--config=qwen3-9b"], "Did you mean qwen3-8b"),
        (["--config=nothing.yaml"], "nothing.yaml does not exist"),
        (["--target.dtype=int3"], "float32"),
        (["--target.taps=[7]"], "tap 7 of 8 layers"),
        (["--target.mask_token=<nothing>"], "is no token"),
        (["--corpus=python-stdlip"], "Did you mean python-stdlib"),
        (["--corpus=me/nothing/else"], "no hub id"),
    ],
)
def test_mistakes_are_one_line_and_status_two(
    words: list[str], capsys: pytest.CaptureFixture[str], extra: list[str], message: str
) -> None:
    assert main(["build", *words, *extra]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


def test_a_build_needs_target_corpus_and_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", "--corpus=python-stdlib", "--out=x"]) == 2
    assert "target" in capsys.readouterr().err
    assert main(["build", "--config=qwen3-8b", "--out=x"]) == 2
    assert "corpus" in capsys.readouterr().err
    assert main(["bild"]) == 2
    assert "Did you mean build" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_no_cache_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert main([command, str(tmp_path / "nothing")]) == 2
    assert "does not exist: build it" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main([command, str(tmp_path / "file")]) == 2
    assert "is a file" in capsys.readouterr().err
    assert main([command]) == 2
    assert "cache" in capsys.readouterr().err


def test_shrink_compresses_as_it_is_told(words: list[str], tmp_path: Path) -> None:
    def compressed(folder: Path) -> bool:
        codecs = json.loads((folder / "shard-00000.zarr/features/zarr.json").read_text())["codecs"]
        return "blosc" in [c["name"] for c in codecs[0]["configuration"]["codecs"]]

    assert main(["build", *words, "--compress_features=true"]) == 0
    for name, more, expected in (("as-it-is", [], True), ("plain", ["--compress_features=false"], False)):
        assert main(["shrink", str(tmp_path / "cache"), f"--out={tmp_path / name}", "--k=2", *more]) == 0
        assert compressed(tmp_path / name) is expected
    again = ["shrink", str(tmp_path / "plain"), f"--out={tmp_path / 'again'}", "--k=1", "--compress_features=true"]
    assert main(again) == 0
    assert compressed(tmp_path / "again")


def test_shrinking_and_estimating_import_nothing_that_takes_seconds_and_is_not_used() -> None:
    lines = [
        "import sys, cache_builder.shrink", "assert 'transformers' not in sys.modules",
        "import cache_builder.estimate", "assert 'lightning' not in sys.modules",
    ]  # fmt: skip
    done = afresh("-c", "\n".join(lines))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["logits_scaling", "logit_scale", "embedding_multiplier"])
def test_a_target_that_no_drafter_can_sit_on_is_refused_before_it_is_cached(
    words: list[str], tiny_target_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    config = json.loads((tiny_target_dir / "config.json").read_text())
    (tiny_target_dir / "config.json").write_text(json.dumps(config | {name: 0.5}))
    assert main(["build", *words]) == 2
    assert f"{name}: 0.5 in the target's config scales its embedding or logits" in capsys.readouterr().err
    assert not list((tmp_path / "cache").glob("shard-*"))


def test_help_lists_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "estimate" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        main(["build", "--help"])
    text = capsys.readouterr().out
    for option in ("--max_documents", "--regenerate", "--features", "--target.taps", "--documents_per_shard"):
        assert option in text
    assert "leave out documents of more tokens" in " ".join(text.split())


@pytest.mark.parametrize("name", known_configs("target"))
@pytest.mark.parametrize("corpus", known_configs("corpus"))
def test_every_shipped_pair_of_configs_parses(name: str, corpus: str) -> None:
    config, _ = parse_build(["--config", name, "--corpus", corpus, "--out=x"])
    assert config.target.name == name
    given: dict[str, Any] = yaml.safe_load((Path("configs/corpus") / f"{corpus}.yaml").read_text())
    assert all(getattr(config, key) == value for key, value in given.items())


def test_options_after_a_corpus_config_win() -> None:
    config, _ = parse_build(["--config=smollm2-135m", "--corpus=python-stdlib", "--out=x", "--max-new-tokens=7"])
    assert config.max_new_tokens == 7
    assert config.corpus == "python-stdlib"


def test_an_unknown_target_name_raises() -> None:
    with pytest.raises(UserError, match="unknown target"):
        parse_build(["--config", "smollm3", "--corpus=x", "--out=x"])
