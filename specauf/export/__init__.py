"""Export to the layouts that servers load, import from them, and the checks of both."""

from specauf.export.card import About
from specauf.export.check import Checked, check_directory, require_sound
from specauf.export.facts import TargetFacts
from specauf.export.problem import Problem
from specauf.export.speculators import export_speculators, read_speculators
from specauf.export.zlab import export_zlab

__all__ = [
    "About",
    "Checked",
    "Problem",
    "TargetFacts",
    "check_directory",
    "export_speculators",
    "export_zlab",
    "read_speculators",
    "require_sound",
]
