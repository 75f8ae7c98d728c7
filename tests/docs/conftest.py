"""A tiny finished cache for what the pages do with one."""

from tests.training.conftest import tiny_cache  # noqa: F401  (a fixture)
