"""Read in the environment `speculators` by its scripts: its models from a directory, and a step for both sides.

speculators takes the verifier's most probable token for the label, so tokens here are the verifier's choices.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from speculators.models.dflash import core

from specauf.checkpoint import load_directory
from specauf.data.batch import BlockBatch
from specauf.drafters import DFlashDrafter, TargetVocabulary
from tests.drafters.tiny import TinyDocument, batch_of

LENGTH, ANCHORS = 40, [3, 11, 12, 20]


class Case(NamedTuple):
    """One drafter on both sides, and blocks for it.

    Attributes:
        theirs: speculators' model.
        ours: ours, with the same weights.
        names: that were `missing` or `unexpected` when theirs was loaded.
        given: what theirs is called with.
        batch: the same for ours.
        target: the verifier's log-probabilities behind every token.
        vocabulary: the verifier's.
    """

    theirs: Any
    ours: DFlashDrafter
    names: dict[str, list[str]]
    given: tuple[torch.Tensor, ...]
    batch: BlockBatch
    target: torch.Tensor
    vocabulary: TargetVocabulary


def load(directory: str, config_class: Any, model_class: Any) -> Case:
    """A drafter from speculators' layout; strict in its names."""
    config = config_class.from_pretrained(directory)
    config.transformer_layer_config._attn_implementation = "eager"  # its default compiles FlexAttention
    theirs, about = model_class.from_pretrained(directory, config=config, output_loading_info=True)
    # Its copy of the verifier's head and norm, which it reads from the verifier.
    theirs.verifier_lm_head.weight.data.copy_(theirs.lm_head.weight)
    torch.nn.init.ones_(theirs.verifier_norm.weight)
    known = ("verifier_lm_head.weight", "verifier_norm.weight")
    names = {"missing": [n for n in about["missing_keys"] if n not in known], "unexpected": about["unexpected_keys"]}
    theirs, ours = theirs.float(), load_directory(Path(directory))
    assert all(torch.equal(theirs.state_dict()[name], value) for name, value in ours.named_parameters())
    random = torch.Generator().manual_seed(0)
    features = torch.randn(LENGTH, ours.config.raw_feature_dim, generator=random)
    last = torch.randn(1, LENGTH, ours.config.hidden_size, generator=random)
    with torch.no_grad():
        target = theirs.verifier_lm_head(theirs.verifier_norm(last))[0].log_softmax(-1)
    tokens = target.argmax(-1).roll(1)
    core.select_anchors = lambda *_: (torch.tensor(ANCHORS), torch.ones(len(ANCHORS), dtype=torch.bool))
    given = (features[None], tokens[None], torch.ones(1, LENGTH), last, torch.zeros(1, LENGTH, dtype=torch.long))
    document = TinyDocument(0, tokens.numpy(), torch.ones(LENGTH, dtype=torch.bool).numpy(), features.numpy())
    batch = batch_of([document], [ANCHORS], ours.config.block_size)
    vocabulary = TargetVocabulary(theirs.embed_tokens.weight.detach(), theirs.lm_head.weight.detach())
    return Case(theirs, ours, {k: sorted(v) for k, v in names.items()}, given, batch, target, vocabulary)


def farthest(theirs: Any, ours: DFlashDrafter) -> float:
    """The largest difference of a gradient as a part of its largest number."""
    wanted, far = dict(theirs.named_parameters()), []
    for name, parameter in ours.named_parameters():
        gradient = parameter.grad.to_dense()
        far.append(((wanted[name].grad - gradient).abs().max() / gradient.abs().max()).item())
    return max(far)
