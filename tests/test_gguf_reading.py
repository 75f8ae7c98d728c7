"""A GGUF target is the model that its file holds, and its file is read once."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from specauf.gguf_reading import gguf_read_once
from specauf.targets import TargetConfig, load_target

HIDDEN, LAYERS, TOKENS = 16, 2, ["<|endoftext|>", "a", "b", "c", "ab", "abc"]


@pytest.fixture
def weights(tmp_path: Path) -> dict[str, np.ndarray]:
    """Those of tmp_path/tiny.gguf, a Llama."""
    shapes = {"token_embd": (len(TOKENS), HIDDEN), "output_norm": (HIDDEN,), "output": (len(TOKENS), HIDDEN)}
    for i in range(LAYERS):
        shapes |= {f"blk.{i}.{name}": (HIDDEN, HIDDEN) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
        shapes |= {f"blk.{i}.{name}": (32, HIDDEN) for name in ("ffn_gate", "ffn_up")}
        shapes |= {f"blk.{i}.ffn_down": (HIDDEN, 32)}
        shapes |= {f"blk.{i}.{name}": (HIDDEN,) for name in ("attn_norm", "ffn_norm")}
    random = np.random.default_rng(0)
    found = {f"{name}.weight": random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    for name, values in found.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return found


def test_a_target_from_a_gguf_file(
    weights: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    own = gguf.GGUFReader.__init__
    monkeypatch.setattr(gguf.GGUFReader, "__init__", lambda self, *args: read.append(1) or own(self, *args))
    config = TargetConfig("tiny", model=str(tmp_path), gguf_file="*.gguf", dtype="float32")
    model, tokenizer = load_target(config)
    assert len(read) == 1
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (LAYERS, HIDDEN)
    for ours, theirs in (
        (model.model.embed_tokens, "token_embd.weight"),
        (model.lm_head, "output.weight"),
        (model.model.layers[1].mlp.down_proj, "blk.1.ffn_down.weight"),
    ):
        assert np.array_equal(ours.weight.numpy(), weights[theirs])
    assert model(input_ids=torch.tensor([[1, 2]])).logits.isfinite().all()
    assert tokenizer("abc", add_special_tokens=False).input_ids == [5]
    load_target(config)
    assert len(read) == 2  # nothing of a file is kept for the next load, by which it may be another


def test_what_is_read_is_what_gguf_reads(weights: dict[str, np.ndarray], tmp_path: Path) -> None:
    theirs = gguf.GGUFReader(tmp_path / "tiny.gguf")
    with gguf_read_once():
        ours = gguf.GGUFReader(tmp_path / "tiny.gguf")
        assert gguf.GGUFReader(tmp_path / "tiny.gguf") is ours
    assert ours.fields.keys() == theirs.fields.keys()
    for name, field in theirs.fields.items():
        assert all(np.array_equal(a, b) for a, b in zip(ours.fields[name].parts, field.parts, strict=True))
    assert [t.name for t in ours.tensors] == list(weights)
    assert all(np.array_equal(t.data, weights[t.name]) for t in ours.tensors)
    assert type(gguf.GGUFReader(tmp_path / "tiny.gguf")) is gguf.GGUFReader
