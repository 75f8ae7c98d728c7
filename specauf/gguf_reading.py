"""A GGUF file is read once for a target: transformers reads it anew for its config, weights and tokenizer."""

import contextlib
import functools
import importlib.util
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np


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
        def data(self) -> Any:  # type: ignore[override]
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
