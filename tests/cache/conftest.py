"""Hypothesis without a clock: the machine that runs the tests is shared."""

from hypothesis import settings

settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")
