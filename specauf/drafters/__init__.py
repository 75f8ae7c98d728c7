"""Drafters: small models that propose a block of tokens for the target to verify."""

from specauf.drafters.base import Branch, Confidence, Drafter
from specauf.drafters.config import DrafterConfig
from specauf.drafters.dflash import DFlashDrafter
from specauf.drafters.dflash2 import DFlash2Config, DFlash2Drafter
from specauf.drafters.domino import DominoConfig, DominoDrafter
from specauf.drafters.dspark import DSparkConfig, DSparkDrafter
from specauf.drafters.masked import MaskedConfig, MaskedDrafter
from specauf.drafters.memory import ContextMemory
from specauf.drafters.proposal import Proposal, greedy
from specauf.drafters.sketch import sketch_of
from specauf.drafters.spec import (
    DFlash2Spec,
    DFlashSpec,
    DominoSpec,
    DrafterSpec,
    DSparkSpec,
    MaskedSpec,
    build_drafter,
    zlab_class,
)
from specauf.drafters.vocabulary import TargetVocabulary

__all__ = [
    "Branch",
    "Confidence",
    "ContextMemory",
    "DFlash2Config",
    "DFlash2Drafter",
    "DFlash2Spec",
    "DFlashDrafter",
    "DFlashSpec",
    "DSparkConfig",
    "DSparkDrafter",
    "DSparkSpec",
    "DominoConfig",
    "DominoDrafter",
    "DominoSpec",
    "Drafter",
    "DrafterConfig",
    "DrafterSpec",
    "MaskedConfig",
    "MaskedDrafter",
    "MaskedSpec",
    "Proposal",
    "TargetVocabulary",
    "build_drafter",
    "greedy",
    "sketch_of",
    "zlab_class",
]
