"""What a target's forward pass calls its arguments."""

import inspect
from typing import Any


def cache_argument(model: Any) -> str:
    """The name of the key-value cache: `cache` since transformers 5.24, which removes the old one in 5.40.

    A model's own code (trust_remote_code) may keep the old one in either.
    """
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
