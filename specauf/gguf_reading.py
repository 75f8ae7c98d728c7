"""Around transformers' loading of a GGUF target: its file is read once, and the model keeps nothing of the format."""

import contextlib
import functools
import importlib.util
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch


@contextlib.contextmanager
def gguf_read_once() -> Iterator[None]:
    """Within it transformers reads each GGUF file once, and in a third of the time; elsewhere nothing changes."""
    if importlib.util.find_spec("gguf") is None:
        yield
        return
    import gguf

    class Reader(gguf.GGUFReader):
        """The header is a hundred thousand small slices; those of a plain array take a third of a np.memmap's time."""

        @property
        def data(self) -> Any:
            return self._plain

        @data.setter
        def data(self, mapped: Any) -> None:
            self._plain = np.asarray(mapped)  # still the mapped file

    once: dict[str, Any] = {
        "GGUFReader": functools.lru_cache(Reader),
        # Asked for again at every tensor, each time for the same architecture and depth.
        "get_tensor_name_map": functools.lru_cache(gguf.get_tensor_name_map),
    }
    with mock.patch.multiple(gguf, **once):
        yield


def plain(model: Any) -> Any:
    """The same weights in a fresh model that has no quantisation config and can be saved."""
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        fresh = type(model)(config)
    fresh.load_state_dict(model.state_dict(), assign=True)
    # Buffers that no state dict holds (rotary frequencies) come from the loaded model.
    buffers = dict(model.named_buffers())
    for name, buffer in list(fresh.named_buffers()):
        if buffer.is_meta:
            owner, _, leaf = name.rpartition(".")
            fresh.get_submodule(owner).register_buffer(leaf, buffers[name], persistent=False)
    fresh.tie_weights()
    return fresh
