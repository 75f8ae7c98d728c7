"""Where the shipped YAML files are, and how a bare name finds one."""

from pathlib import Path

from specauf.errors import UserError, unknown_name


def config_root() -> Path:
    """The folder of shipped configs: `specauf/configs` in a wheel, `configs/` in a checkout."""
    packaged = Path(__file__).parent / "configs"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "configs"


def known_configs(kind: str) -> list[str]:
    """Names of the shipped configs of a kind (`loss`, `drafter`, `target`, `corpus`, `trainer`)."""
    return sorted(path.stem for path in (config_root() / kind).glob("*.yaml"))


def find_config(kind: str, name: str) -> Path:
    """The YAML file that `name` means: a path to a file, or the bare name of a shipped config.

    Raises:
        UserError: nothing of that name exists; the message lists the names there are.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path
        if path.parent.name != kind:
            raise UserError(
                f"{kind} config {name} does not exist: give a YAML file or one of {', '.join(known_configs(kind))}"
            )
        name = path.stem
    shipped = config_root() / kind / f"{name}.yaml"
    if not shipped.is_file():
        raise unknown_name(kind, name, known_configs(kind))
    return shipped
