"""Exports in the hands of the packages that people load them with."""

import json
from pathlib import Path

import pytest
import torch

from specauf.decoding import speculative_generate
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
    assert compare_decoding(drafter, zlab, str(target_directory), prompts, 40, tmp_path) > 20


def test_speculators_package_gives_our_logits(drafter, zlab, target_directory, tmp_path):
    target = make_target()
    from specauf.drafters import TargetVocabulary

    vocabulary = TargetVocabulary.from_target(target)
    facts = TargetFacts.from_config(target.config.to_dict(), "the tiny target", vocabulary=vocabulary)
    export_speculators(drafter, tmp_path / "s", target=facts, dtype=torch.float32)
    record = json.loads(run_in("speculators", "speculators_forward.py", str(tmp_path / "s"), str(zlab)))
    assert record["rows"] == 4 * 5
    assert record["largest"] > 1
    assert record["difference"] < 1e-4


def test_llama_cpp_converter_takes_an_export(drafter, zlab, target_directory, tmp_path):
    out = run_in("llama_cpp", "llama_cpp_convert.py", str(zlab), str(target_directory), str(tmp_path / "drafter.gguf"))
    record = json.loads(out)
    assert all(record["equal"].values())
    assert len(record["equal"]) == 3 + 11 * drafter.config.num_hidden_layers
    assert record["left"] == []
    fields = record["fields"]
    assert fields["general.architecture"] == "dflash"
    assert fields["dflash.target_layers"] == [tap + 1 for tap in drafter.config.taps]
    assert fields["dflash.block_size"] == drafter.config.block_size
    assert fields["tokenizer.ggml.mask_token_id"] == drafter.config.mask_token_id
    assert fields["dflash.attention.key_length"] == drafter.config.head_dim
    assert fields["dflash.rope.freq_base"] == drafter.config.rope_theta
