"""Where the shipped YAML files are, and how a bare name finds one."""

from pathlib import Path

import yaml

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
            require_yaml(path)
            return path
        if path.parent.name != kind:
            what, known = f"{kind} config".strip(), ", ".join(known_configs(kind))
            raise UserError(f"{what} {name} does not exist: give a YAML file or one of {known}")
        name = path.stem
    shipped = config_root() / kind / f"{name}.yaml"
    if not shipped.is_file():
        raise unknown_name(kind, name, known_configs(kind))
    return shipped


def require_yaml(path: Path) -> None:
    """Check that a file can be read as YAML; jsonargparse's own message does not name it.

    Raises:
        UserError: it cannot.
    """
    try:
        yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"config {path} cannot be read: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config {path} is not YAML: {' '.join(str(error).split())}") from error
