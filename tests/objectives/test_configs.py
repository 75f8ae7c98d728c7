"""Every file of configs/loss/ loads, and none inherits anything from another."""

import collections
import inspect
from argparse import ArgumentError
from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser

import specauf.objectives
from specauf.objectives import Divergence, Objective, Weighting

FILES = sorted((Path(__file__).resolve().parents[2] / "configs/loss").glob("*.yaml"))
NAMES = [file.stem for file in FILES]


class Model:
    def __init__(self, loss: Objective):
        self.loss = loss


def parser():
    """A parser that takes the model's loss in the way that LightningCLI does."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(Model, "model", sub_configs=True)
    return parser


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_loads(file):
    loaded = parser()
    objective = loaded.instantiate(loaded.parse_args([f"--model.loss={file}"])).model.loss
    assert isinstance(objective, Objective)


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_lists_every_argument(file):
    """What the file says is the whole configuration: parsing it adds nothing."""
    parsed = parser().parse_args([f"--model.loss={file}"]).model.loss.as_dict()
    del parsed["__path__"]
    assert parsed == yaml.safe_load(file.read_text())


# Between them they use every class that has arguments.
EARLIER = ["decay", "auf-decay", "auf-warmup", "auf-soft-tail", "dpace", "lk-hybrid", "expected-length", "dspark"]


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_a_later_file_inherits_nothing(file, tmp_path):
    expected = parser().parse_args([f"--model.loss={file}"]).model.loss
    earlier = [file.with_name(f"{name}.yaml") for name in EARLIER if name != file.stem]
    flags = [f"--model.loss={other}" for other in earlier]
    assert parser().parse_args([*flags, f"--model.loss={file}"]).model.loss == expected
    config = tmp_path / "run.yaml"
    config.write_text(f"model:\n  loss: {earlier[-1]}\n")
    assert parser().parse_args([f"--config={config}", f"--model.loss={file}"]).model.loss == expected


CLASSES = [
    getattr(specauf.objectives, name)
    for name in specauf.objectives.__all__
    if isinstance(getattr(specauf.objectives, name), type)
    and issubclass(getattr(specauf.objectives, name), Weighting | Divergence)
    and not inspect.isabstract(getattr(specauf.objectives, name))
]


@pytest.mark.parametrize("base", [Weighting, Divergence])
def test_no_two_classes_share_an_argument(base):
    """A flag that changes only the class keeps the arguments that the new class has too: so none may be shared."""
    owners = collections.defaultdict(list)
    for cls in CLASSES:
        if issubclass(cls, base):
            for argument in set(inspect.signature(cls).parameters) - {"args", "kwargs"}:
                owners[argument].append(cls.__name__)
    assert len(owners) >= 3
    assert {argument: names for argument, names in owners.items() if len(names) > 1} == {}


def test_changing_the_class_by_flag_inherits_nothing():
    decay = FILES[NAMES.index("decay")]
    args = [f"--model.loss={decay}", "--model.loss.weighting=AcceptUntilFail"]
    parsed = parser().parse_args(args)
    assert parsed.model.loss.init_args.weighting.init_args.as_dict() == {"decay_gamma": None}


def test_an_argument_can_be_set_by_flag():
    decay = FILES[NAMES.index("decay")]
    built = parser()
    loss = built.instantiate(built.parse_args([f"--model.loss={decay}", "--model.loss.weighting.gamma=4"])).model.loss
    assert loss.weighting.gamma == 4.0


def test_an_unknown_choice_lists_the_known():
    with pytest.raises(ArgumentError, match=r"token.*block.*block_sum"):
        parser().parse_args([f"--model.loss={FILES[0]}", "--model.loss.reduction=tokens"])


def test_every_class_has_a_file():
    text = "".join(file.read_text() for file in FILES)
    assert [cls.__name__ for cls in CLASSES if f"specauf.objectives.{cls.__name__}\n" not in text] == []
