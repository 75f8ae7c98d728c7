"""What is written comes back, for every kind of feature and on every kind of store."""

import numpy as np
import pytest

from specauf.cache import open_cache, verify
from tests.cache.making import build, identity


@pytest.mark.parametrize("features", ["none", "bf16", "int8", "sketch"])
@pytest.mark.parametrize(("store", "compressed"), [("local", False), ("local", True), ("memory", False)])
def test_documents_come_back(tmp_path, features, store, compressed):
    url = str(tmp_path / "cache") if store == "local" else f"memory://{tmp_path.name}/{features}"
    who = identity(features=features, sketch_rank=8 if features == "sketch" else 0)
    written = build(url, who, [[9, 3, 17, 2], [1, 40, 6, 5, 8, 30]], compress_features=compressed)
    cache = open_cache(url)
    assert verify(cache) == []
    assert len(cache) == len(written) == cache.manifest.counts.documents
    assert cache.manifest.drops == {"too short": 2, "empty": 2}
    for index, (document, exact) in enumerate(zip(cache.documents(), written, strict=True)):
        assert document.index == index
        np.testing.assert_array_equal(document.tokens, exact.tokens)
        np.testing.assert_array_equal(document.loss_mask, exact.loss_mask)
        np.testing.assert_array_equal(document.row_index, exact.row_index)
        np.testing.assert_array_equal(document.topk_ids, exact.topk_ids)
        np.testing.assert_allclose(document.topk_logprobs, exact.topk_logprobs, atol=0.07)
        np.testing.assert_allclose(document.head_mass, np.exp(exact.topk_logprobs).sum(1), atol=1e-3)
        assert document.held_out == exact.held_out
        if features == "none":
            assert document.features is None
            continue
        assert exact.features is not None
        if features == "sketch":
            z = (exact.features.numpy() / cache.codec.channel_scale) @ cache.codec.basis
            np.testing.assert_allclose(document.sketch, z, atol=np.abs(z).max() / 100)
        else:
            np.testing.assert_allclose(document.features, exact.features, atol=0.06)
