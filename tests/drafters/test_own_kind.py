"""A drafter of one's own has a name of its own, or its checkpoints would be read as another kind."""

import pytest

from specauf.checkpoint import load_drafter
from specauf.drafters import DFlashDrafter, DFlashSpec, Drafter, DrafterConfig
from specauf.errors import UserError
from tests.training.conftest import tiny_cache  # noqa: F401  (a fixture)
from tests.training.running import fit_here


class NamelessDrafter(DFlashDrafter):
    pass


class NamelessSpec(DFlashSpec):
    def __init__(self, **more) -> None:
        super().__init__(**more)

    def _fresh(self, manifest, target):
        return NamelessDrafter(DrafterConfig.from_target(target.config, **self._settings(manifest)))


class HalfNamedSpec(NamelessSpec):
    name = "half"


def options(spec: type) -> tuple[str, ...]:
    return ("--model.loss=auf", f"--model.drafter={spec.__module__}.{spec.__qualname__}", "--trainer.max_steps=1")


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (
            NamelessSpec,
            "NamelessSpec has the name 'dflash', which is that of DFlashDrafter, and makes a NamelessDrafter",
        ),
        (HalfNamedSpec, "HalfNamedSpec has the name 'half', which is that of no drafter, and makes a NamelessDrafter"),
    ],
)
def test_without_one_it_is_refused_before_the_first_step(tiny_cache, tmp_path, capsys, spec, says):  # noqa: F811
    assert fit_here(tiny_cache, tmp_path / "run", *options(spec)) == 2
    assert f"error: model.drafter: {says}: give both classes a `name` of their own" in capsys.readouterr().err
    assert not (tmp_path / "run/checkpoints").exists()


def test_with_one_it_is_read_where_it_is_imported(tiny_cache, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(Drafter, "kinds", dict(Drafter.kinds))
    own = type("OwnDrafter", (DFlashDrafter,), {"name": "own"})
    monkeypatch.setattr(
        HalfNamedSpec,
        "_fresh",
        lambda self, manifest, target: own(DrafterConfig.from_target(target.config, **self._settings(manifest))),
    )
    monkeypatch.setattr(HalfNamedSpec, "name", "own")
    assert fit_here(tiny_cache, tmp_path / "run", *options(HalfNamedSpec)) == 0
    assert type(load_drafter(tmp_path / "run")) is own
    del Drafter.kinds["own"]
    with pytest.raises(UserError, match=r"unknown drafter 'own'.*must be imported by specauf/drafters/__init__.py"):
        load_drafter(tmp_path / "run")
