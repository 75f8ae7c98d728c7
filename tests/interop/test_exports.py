"""Exports in the hands of the packages that people load them with."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from specauf.decoding import speculative_generate
from specauf.drafters import TargetVocabulary
from specauf.export import TargetFacts, export_speculators, export_zlab
from specauf.targets import load_target, resolve_target
from tests.builder.conftest import make_target, make_tokenizer
from tests.drafters.tiny import tiny_dflash
from tests.interop.environments import run_in

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def target_directory(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    make_target().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    # In fp32: in half precision two drafted tokens may tie.
    about = {"target": {"name": "tiny", "model": str(folder), "dtype": "float32"}}
    (folder / "target.yaml").write_text(yaml.safe_dump(about))
    return folder


@pytest.fixture(scope="module")
def drafter():
    torch.manual_seed(0)
    return tiny_dflash(make_target(), taps=(1, 3, 5), mask_token_id=258, block_size=6)


@pytest.fixture(scope="module")
def zlab(drafter, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("zlab") / "drafter"
    export_zlab(drafter, folder, dtype=torch.float32)
    return folder


def compare_decoding(
    drafter, directory: Path, name: str, prompts: list, new: int, folder: Path, threads: int = 1
) -> int:
    """Decode with z-lab's package and with ours, and with neither; return the number of cycles compared.

    z-lab's loop drafts a shorter block where fewer tokens than a block are left, ours drafts whole blocks always, so
    cycles that start there are left out.
    """
    target, _ = load_target(resolve_target(name))
    eos = target.generation_config.eos_token_id
    stops = eos if isinstance(eos, list) else [eos]
    task = folder / "task.json"
    task.write_text(json.dumps({"prompts": prompts, "max_new_tokens": new, "stops": stops}))
    theirs = json.loads(run_in("dflash", "dflash_decode.py", str(directory), name, str(task), str(threads)))
    lengths: dict[str, list[int]] = {"ours": [], "theirs": []}
    for prompt, answer in zip(prompts, theirs, strict=True):
        ids = torch.tensor([prompt])
        plain = target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
        ours = speculative_generate(target, drafter, ids, max_new_tokens=new, stop_token_ids=stops)
        assert answer["tokens"] == plain[0, len(prompt) :].tolist()
        assert list(ours.tokens) == answer["tokens"]
        counted = {}
        for who, produced in (("theirs", answer["produced"]), ("ours", [a + 1 for a in ours.accepted])):
            starts = [1 + sum(produced[:i]) for i in range(len(produced))]
            # The cycle that the answer's end cuts short is no whole one either.
            whole = [(s, p) for s, p in zip(starts, produced, strict=True) if s + drafter.config.block_size <= new]
            counted[who] = [p for s, p in whole if s + p < len(answer["tokens"])]
        assert counted["ours"] == counted["theirs"]
        for who, values in counted.items():
            lengths[who] += values
    assert sum(lengths["ours"]) / len(lengths["ours"]) == sum(lengths["theirs"]) / len(lengths["theirs"])
    return len(lengths["ours"])


def test_zlab_package_decodes_an_export_cycle_for_cycle(drafter, zlab, target_directory, tmp_path):
    prompts = torch.randint(0, 256, (4, 9), generator=torch.Generator().manual_seed(1)).tolist()
    assert compare_decoding(drafter, zlab, str(target_directory / "target.yaml"), prompts, 40, tmp_path) > 20


def test_speculators_package_gives_our_logits(drafter, zlab, tmp_path):
    target = make_target()
    vocabulary = TargetVocabulary.from_target(target)
    facts = TargetFacts.from_config(target.config.to_dict(), "the tiny target", vocabulary=vocabulary)
    export_speculators(drafter, tmp_path / "s", target=facts, dtype=torch.float32)
    record = json.loads(run_in("speculators", "speculators_forward.py", str(tmp_path / "s"), str(zlab)))
    assert record["rows"] == 4 * 5
    assert record["largest"] > 1
    assert record["difference"] < 1e-4


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> tuple[Path, Any]:
    """Config and tokenizer of SmolLM2, whose pre-tokenizer llama.cpp's converter knows; and the target itself."""
    folder = tmp_path_factory.mktemp("smollm2")
    target, tokenizer = load_target(resolve_target("smollm2-135m"))
    tokenizer.save_pretrained(folder)
    config = {k: v for k, v in target.config.to_dict().items() if k not in ("quantization_config", "dtype")}
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    return folder, target


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_llama_cpp_converter_takes_an_export(smollm2, tmp_path, dtype):
    folder, target = smollm2
    torch.manual_seed(0)
    drafter = tiny_dflash(target, taps=(1, 8, 14, 20, 27), mask_token_id=16, block_size=16)
    export_zlab(drafter, tmp_path / "zlab", dtype=dtype, target=TargetFacts.from_file(folder))
    words = (str(tmp_path / "zlab"), str(folder), str(tmp_path / "drafter.gguf"))
    record = json.loads(run_in("llama_cpp", "llama_cpp_convert.py", *words))
    assert all(record["equal"].values())
    assert len(record["equal"]) == 3 + 11 * drafter.config.num_hidden_layers
    assert record["left"] == []
    fields = record["fields"]
    assert fields.pop("dflash.attention.layer_norm_rms_epsilon") == pytest.approx(drafter.config.rms_norm_eps)
    assert fields == {
        "general.architecture": "dflash",
        "dflash.block_count": 2,
        "dflash.block_size": 16,
        "dflash.target_layers": [2, 9, 15, 21, 28],  # layers whose input is tapped
        "tokenizer.ggml.mask_token_id": 16,
        "dflash.context_length": 8192,
        "dflash.embedding_length": 576,
        "dflash.feed_forward_length": 1536,
        "dflash.attention.head_count": 9,
        "dflash.attention.head_count_kv": 3,
        "dflash.attention.key_length": 64,
        "dflash.attention.value_length": 64,
        "dflash.rope.freq_base": 100000.0,
        **{name: value for name, value in fields.items() if name == "dflash.rope.scaling.type" and value == "none"},
    }
