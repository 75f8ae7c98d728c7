"""The two ways of attending agree: FlexAttention on CUDA, SDPA document by document elsewhere."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

from specauf.drafters.attention import BlockLayout, SdpaAttend, training_attend
from specauf.drafters.flex import TILE, FlexAttend, flex_attention
from tests.drafters.tiny import batch_of, document, tiny_drafter, tiny_target, vocabulary_of

# Documents of 40, 7 and 150 tokens; blocks with no context, a little and all of it, across tiles of 128.
STARTS = [0, 0, 40, 40, 47, 47, 47, 47]
LENGTHS = [0, 39, 1, 6, 0, 77, 128, 149]


def inputs(queries: int, block: int, kv_heads: int, device: str = "cpu", width: int = 16):
    generator = torch.Generator().manual_seed(queries)
    shapes = [(8, queries, 4, width), *[(197, kv_heads, width)] * 2, (8, block, kv_heads, width)]
    tensors = [torch.randn(*shape, generator=generator) for shape in [*shapes, shapes[-1]]]
    return [t.to(device).requires_grad_() for t in tensors]


def layout(device: str = "cpu") -> BlockLayout:
    return BlockLayout(torch.tensor(STARTS, device=device), torch.tensor(LENGTHS, device=device))


def plain(query, context_key, context_value, block_key, block_value):
    """One block, one head, one query at a time."""
    out = torch.zeros_like(query)
    share = query.shape[2] // block_key.shape[2]
    for n, (start, length) in enumerate(zip(STARTS, LENGTHS, strict=True)):
        key = torch.cat([context_key[start : start + length], block_key[n]])
        value = torch.cat([context_value[start : start + length], block_value[n]])
        for head in range(query.shape[2]):
            scores = query[n, :, head] @ key[:, head // share].T / query.shape[-1] ** 0.5
            out[n, :, head] = scores.softmax(-1) @ value[:, head // share]
    return out


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("width", [8, 16, 24])
@pytest.mark.parametrize(("queries", "block", "kv_heads"), [(6, 6, 2), (5, 6, 2), (5, 6, 4), (31, 32, 1)])
def test_both_agree_with_the_plain_sum(queries: int, block: int, kv_heads: int, width: int):
    with torch.no_grad():
        given = inputs(queries, block, kv_heads, width=width)
        expected = plain(*given)
        torch.testing.assert_close(SdpaAttend(layout())(*given), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(FlexAttend(layout(), flex_attention)(*given), expected, atol=1e-5, rtol=0)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 400), st.lists(st.integers(0, 400), min_size=1, max_size=9)), min_size=1, max_size=4
    ),
    st.sampled_from([2, 4, 8, 16, 40, 128, 150, 256]),
    st.booleans(),
)
def test_the_tiles_are_those_of_the_whole_mask(documents, block, drafted_only):
    """`create_block_mask` looks at every row and column; the layout alone says the same."""
    starts, lengths, at = [], [], 0
    for tokens, anchors in documents:
        starts += [at] * len(anchors)
        lengths += [min(anchor, tokens - 1) for anchor in anchors]
        at += tokens
    if len(starts) == 1:
        return  # its mask has a second block that only fills the tile
    layout, queries = BlockLayout(torch.tensor(starts), torch.tensor(lengths)), block - drafted_only
    room = -(-at // TILE) * TILE
    made = FlexAttend(layout, flex_attention)._mask(queries, block, room)
    rows, columns = made.seq_lengths
    expected = create_block_mask(made.mask_mod, None, None, rows, columns, device="cpu", BLOCK_SIZE=TILE)
    for numbers, indices in (("kv_num_blocks", "kv_indices"), ("full_kv_num_blocks", "full_kv_indices")):
        counts = getattr(expected, numbers)
        assert torch.equal(getattr(made, numbers), counts)
        used = torch.arange(columns // TILE) < counts[..., None]
        assert torch.equal(getattr(made, indices)[used], getattr(expected, indices)[used])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kind", ["dflash", "domino", "dspark", "masked"])
def test_a_drafter_has_the_same_hidden_states_either_way(kind: str, monkeypatch):
    target = tiny_target()
    drafter, vocabulary = tiny_drafter(kind, target), vocabulary_of(target)
    batch = batch_of([document(target, 5, 12, 1), document(target, 3, 9, 2)], [[1, 5, 8], [4, 11]])
    with torch.no_grad():
        expected = drafter(batch, vocabulary)
        monkeypatch.setattr("specauf.drafters.base.training_attend", lambda at, kind: FlexAttend(at, flex_attention))
        torch.testing.assert_close(drafter(batch, vocabulary), expected, atol=1e-5, rtol=0)


def test_a_cpu_trains_with_sdpa():
    assert isinstance(training_attend(layout()), SdpaAttend)


def test_either_attention_may_be_asked_for():
    with torch.no_grad():
        assert isinstance(training_attend(layout(), "flex"), FlexAttend)
    assert isinstance(training_attend(layout(), "sdpa"), SdpaAttend)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.gpu
@pytest.mark.parametrize(("kv_heads", "width"), [(1, 16), (2, 16), (4, 16), (2, 8), (2, 24)])
def test_compiled_flex_attention_agrees_with_sdpa_and_so_do_the_gradients(kv_heads: int, width: int):
    assert isinstance(training_attend(layout("cuda")), FlexAttend)
    results = []
    for attend in (SdpaAttend(layout("cuda")), FlexAttend(layout("cuda"))):
        given = inputs(15, 16, kv_heads, "cuda", width)
        out = attend(*given)
        out.square().sum().backward()
        results.append([out, *(t.grad for t in given)])
    torch.testing.assert_close(results[0], results[1], atol=2e-3, rtol=2e-3)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile looks at it
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_ragged_lengths_do_not_compile_anew(device: str):
    from torch._dynamo.utils import counters

    # What is compiled anew does not depend on what makes code of it, and a CPU has no such kernel with gradients.
    kernel = torch.compile(flex_attention, dynamic=True, backend="eager") if device == "cpu" else None

    def attend(blocks: int) -> None:
        given = inputs(16, 16, 2, device)
        at = BlockLayout(*(torch.tensor(v[:blocks], device=device) for v in (STARTS, LENGTHS)))
        tensors = [t if n in (1, 2) else t[:blocks] for n, t in enumerate(given)]
        with torch.set_grad_enabled(device == "cuda"):
            FlexAttend(at, kernel)(*tensors)

    attend(8)
    attend(7)
    before = counters["stats"]["unique_graphs"]
    for blocks in (1, 2, 3, 5, 6):
        attend(blocks)
    assert counters["stats"]["unique_graphs"] == before


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_batches_of_all_sizes_share_a_program(device: str):
    """One program, and one more for batches whose rows fill a single tile: torch takes sizes of 1 for constants."""
    from torch._dynamo.utils import counters

    kernel = torch.compile(flex_attention, dynamic=True, backend="eager") if device == "cpu" else None

    def attend(tokens: int, blocks: int) -> None:
        shapes = [(blocks, 15, 4, 16), (tokens, 2, 16), (tokens, 2, 16), (blocks, 16, 2, 16), (blocks, 16, 2, 16)]
        lengths = torch.arange(blocks, device=device) * (tokens - 1) // blocks
        at = BlockLayout(torch.zeros_like(lengths), lengths)
        needed = device == "cuda"
        with torch.set_grad_enabled(needed):
            FlexAttend(at, kernel)(*(torch.randn(*s, device=device, requires_grad=needed) for s in shapes))

    before = counters["stats"]["unique_graphs"]
    for tokens, blocks in (
        (300, 20),
        (700, 33),
        (90, 12),
        (1500, 64),
        (129, 9),
        (1000, 40),
        (50, 4),
        (400, 7),
        (2000, 2),
    ):
        attend(tokens, blocks)
    assert counters["stats"]["unique_graphs"] <= before + 2


def test_attention_gets_one_type_under_autocast(monkeypatch):
    """Norms and rotations come in fp32 there, values in half; FlexAttention's backward takes only one type."""
    target = tiny_target()
    drafter, vocabulary = tiny_drafter("dflash", target), vocabulary_of(target)
    batch = batch_of([document(target, 5, 12, 1)], [[1, 5, 8]])
    seen = []

    class Look(SdpaAttend):
        def __call__(self, *given: torch.Tensor) -> torch.Tensor:
            seen.append({t.dtype for t in given})
            return super().__call__(*given)

    monkeypatch.setattr("specauf.drafters.base.training_attend", lambda at, kind: Look(at))
    for module in drafter.modules():
        if isinstance(module, torch.nn.RMSNorm):  # as CUDA's autocast has them, and the CPU's has not
            monkeypatch.setattr(
                module, "forward", lambda x, norm=module: torch.nn.RMSNorm.forward(norm, x.float()).float()
            )
    with torch.autocast("cpu", torch.bfloat16):
        drafter(batch, vocabulary)
    assert seen == [{torch.bfloat16}] * len(drafter.layers)
