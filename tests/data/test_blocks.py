import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specauf.cache import open_cache
from specauf.data.blocks import block_targets, eligible_anchors, make_block_batch, sample_anchors
from tests.cache.making import build, identity

BLOCK = 5


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    build(folder, identity(), [[9, 30, 14], [22, 7]])
    return open_cache(str(folder))


def batch(cache, numbers, **changes):
    options = {"block_size": BLOCK, "anchors_per_document": 4, "seed": 0, "epoch": 0, "teacher": True} | changes
    return make_block_batch([cache.document(n) for n in numbers], **options)


@given(st.lists(st.booleans(), min_size=2, max_size=40))
def test_an_anchor_and_its_next_token_are_supervised(mask):
    mask = np.array(mask)
    expected = [t for t in range(1, len(mask) - 1) if mask[t] and mask[t + 1]]
    assert eligible_anchors(mask).tolist() == expected


def test_sampled_anchors_are_distinct_sorted_and_eligible():
    mask = np.arange(50) >= 20
    drawn = sample_anchors(mask, 8, np.random.default_rng(0))
    assert len(set(drawn)) == 8
    assert (np.diff(drawn) > 0).all()
    assert set(drawn) <= set(eligible_anchors(mask))


def test_eligible_anchors_do_not_change_their_argument():
    mask = np.ones(6, bool)
    eligible_anchors(mask)
    assert mask.all()


def test_every_slot_against_a_loop(cache):
    for number in range(len(cache)):
        document = cache.document(number)
        anchors = eligible_anchors(document.loss_mask)
        targets = block_targets(document, anchors, BLOCK, teacher=True)
        for b, anchor in enumerate(anchors):
            for slot in range(1, BLOCK):
                t = anchor + slot
                valid = t < len(document.tokens) and document.loss_mask[t]
                assert targets.valid[b, slot - 1] == valid
                if valid:
                    row = document.row_index.tolist().index(t - 1)  # row t-1 describes the token at t
                    assert targets.labels[b, slot - 1] == document.tokens[t]
                    assert targets.teacher_ids[b, slot - 1].tolist() == document.topk_ids[row].tolist()
                    np.testing.assert_array_equal(targets.teacher_logprobs[b, slot - 1], document.topk_logprobs[row])
                    assert targets.head_mass[b, slot - 1] == document.head_mass[row]
                else:
                    assert targets.labels[b, slot - 1] == 0


def test_blocks_stay_within_their_document_when_packed(cache):
    packed = batch(cache, [1, 3, 0])
    for anchor, owner in zip(packed.anchors, packed.anchor_doc, strict=True):
        assert packed.doc_offsets[owner] < anchor < packed.doc_offsets[owner + 1] - 1
    last_valid = packed.anchors + (packed.targets.valid * torch.arange(1, BLOCK)).amax(1)
    assert (last_valid < packed.doc_offsets[packed.anchor_doc + 1]).all()
    for d, number in enumerate([1, 3, 0]):
        part = slice(packed.doc_offsets[d], packed.doc_offsets[d + 1])
        np.testing.assert_array_equal(packed.tokens[part], cache.document(number).tokens)
        np.testing.assert_array_equal(packed.features[part], cache.document(number).features)


def test_anchors_depend_on_seed_epoch_and_document_only(cache):
    def drawn(numbers, **changes):
        b = batch(cache, numbers, **changes)
        return {b.doc_ids[d]: (b.anchors[b.anchor_doc == d] - b.doc_offsets[d]).tolist() for d in range(len(numbers))}

    together = drawn([1, 3, 0])
    assert together == drawn([0]) | drawn([3, 1])
    assert together != drawn([1, 3, 0], epoch=1)
    assert together != drawn([1, 3, 0], seed=1)


def test_what_is_not_asked_for_is_not_read(cache):
    bare = batch(cache, [1], teacher=False, features=False)
    assert bare.features is None
    assert bare.targets.teacher_ids is None


def test_every_tensor_is_pinned_and_on_its_way_to_a_gpu_only(cache, monkeypatch):
    """Without a GPU nothing can be pinned or moved there: what torch is asked for is what counts."""
    asked = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: asked.append("pin") or self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device, **how: asked.append((device, how)) or self)
    given = batch(cache, [1, 3])
    assert given.pin_memory().doc_ids == given.doc_ids
    assert asked == ["pin"] * 10
    for device, queued in (("cuda:0", True), ("cpu", False)):
        asked.clear()
        assert given.to(device).targets == given.targets
        assert asked == [(device, {"non_blocking": queued})] * 10


def test_features_come_in_the_type_that_is_asked_for(cache):
    wide, narrow = batch(cache, [1, 3]), batch(cache, [1, 3], feature_dtype=torch.bfloat16)
    assert wide.features.dtype == torch.float32
    assert torch.equal(narrow.features, wide.features.bfloat16())
