from tests.training.conftest import tiny_cache  # noqa: F401  (a fixture)
