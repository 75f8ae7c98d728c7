"""From a run directory, a Lightning checkpoint, a z-lab or a speculators directory to a drafter ready to decode."""

import hashlib
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from specauf.drafters import DFlashDrafter, Drafter, build_drafter, zlab_class
from specauf.drafters.files import CONFIG, WEIGHTS, read_json
from specauf.drafters.foreign import require_numbers, require_structure
from specauf.errors import UserError

FORMAT = 1
"""Version of what stands under the key `specauf` of a checkpoint; those without a number are of version 1."""


def load_drafter(path: Path | str, num_target_layers: int | None = None) -> Drafter:
    """The drafter at `path`, in fp32 on the CPU, in evaluation mode and servable: a sketch basis is folded into `fc`.

    Args:
        path: run directory (its best checkpoint is taken), `.ckpt` file, z-lab or speculators directory.
        num_target_layers: depth of the target, for a speculators directory that does not hold it.

    Raises:
        UserError: nothing there is a drafter.
    """
    path = Path(path)
    if is_model_directory(path):
        return load_directory(path, num_target_layers)
    file = find_checkpoint(path)
    return drafter_of(load_checkpoint(file), file).eval()


def weights_digest(drafter: Drafter) -> str:
    """Sha256 of a drafter's weights, the same for a run and for its exports in bfloat16 or float32.

    They are taken as exports store them, in bfloat16, and without `fc`: a sketch is folded into it with other rounding
    on other machines. An export in float16 is a drafter of its own: no digest bridges two roundings.
    """
    digest = hashlib.sha256(drafter.name.encode())
    for name, value in sorted(drafter.state_dict().items()):
        if name != "fc.weight":
            digest.update(f"{name} {list(value.shape)}".encode())
            digest.update(value.detach().to("cpu", torch.bfloat16).flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def known_digests(drafter: Drafter, path: Path) -> frozenset[str]:
    """Digests by which a record may know this drafter, which was read from `path`.

    Raises:
        UserError: nothing there is a drafter.
    """
    return frozenset((weights_digest(drafter), _files_digest(path)))


def _files_digest(path: Path) -> str:
    """What early evaluation records hold instead: of the files with the weights."""
    files = sorted(path.glob("*.safetensors")) if is_model_directory(path) else [find_checkpoint(path)]
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def is_model_directory(path: Path) -> bool:
    """Whether `path` is a directory of weights with a config, and not a run."""
    return path.is_dir() and ((path / CONFIG).is_file() or (path / WEIGHTS).is_file())


def lacks_depth(path: Path) -> bool:
    """Whether the drafter at `path` does not say how deep its target is: speculators' layout need not."""
    if not is_model_directory(path):
        return False
    raw = read_json(path / CONFIG)
    return "speculators_model_type" in raw and raw.get("num_target_layers") is None


def load_directory(path: Path, num_target_layers: int | None = None) -> DFlashDrafter:
    """The drafter of a z-lab or speculators directory, in fp32 on the CPU.

    Raises:
        UserError: it is neither, its head is a reduced one, or it brings its own row for the mask token.
    """
    from specauf.export.speculators import is_speculators, read_speculators  # transformers' config classes

    raw = read_json(path / CONFIG)
    require_structure(raw)
    require_numbers(raw)
    if (path / "mask_embedding.pt").exists():
        raise UserError(
            f"{path}: mask_embedding.pt found, none expected: vLLM puts it in the place of the target's mask row, "
            "which is not built here; take a drafter that was trained with the target's own row"
        )
    if not is_speculators(raw):
        return zlab_class(raw).from_pretrained(path)
    config, weights, ids = read_speculators(path, num_target_layers)
    if ids is not None:
        raise UserError(
            f"draft_vocab_size: {len(ids)} in {path}, the whole {config.vocab_size} expected; a drafter with a reduced "
            "head cannot be read without its d2t"
        )
    drafter = zlab_class(raw)(config)  # its fields lie at the top here
    drafter.load_state_dict({name: value.float() for name, value in weights.items()})
    return drafter.eval()


def drafter_of(checkpoint: dict[str, Any], path: Path) -> Drafter:
    """The drafter in a loaded checkpoint, with a sketch folded in.

    Args:
        checkpoint: as `load_checkpoint` gives it.
        path: where it came from, for messages.

    Raises:
        UserError: it is of another version, or not whole.
    """
    about = checkpoint["specauf"]
    for name in ("drafter", "config"):
        if name not in about:
            raise UserError(f"checkpoint {path}: {name} missing; it was written by another version of specauf")
    try:
        drafter = build_drafter(about["drafter"], about["config"])
        drafter.load_state_dict(drafter_state(checkpoint))
    except (KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"checkpoint {path}: config and weights do not make a {about['drafter']} drafter ({reason}); it was "
            "written by another version of specauf, train again or use that version"
        ) from error
    sketch = about.get("sketch")
    if not sketch:
        return drafter
    if not isinstance(drafter, DFlashDrafter):
        raise UserError(f"checkpoint {path}: sketch found for a {about['drafter']} drafter, which has no fc to fold")
    return drafter.fold_sketch(sketch)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint file that `path` means.

    Raises:
        UserError: there is none.
    """
    if path.is_file():
        return path
    for name in ("best.ckpt", "last.ckpt"):
        for folder in (path / "checkpoints", path):
            if (folder / name).is_file():
                return folder / name
    if not path.exists():
        raise UserError(f"{path} does not exist: give a run directory, a .ckpt file or a drafter's directory")
    raise UserError(
        f"{path} holds no drafter: give a run directory with checkpoints/, a .ckpt file, or a directory with "
        "config.json and model.safetensors"
    )


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A Lightning checkpoint of `specauf fit`, read without running code from it.

    Raises:
        UserError: the file is broken, not ours, or of another version.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        # Only the first sentence: torch's next one advises to run what the file says.
        reason = (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0]
        raise UserError(f"checkpoint {path} cannot be read ({reason}): it is damaged or not a checkpoint") from error
    about = checkpoint.get("specauf") if isinstance(checkpoint, dict) else None
    if not isinstance(about, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise UserError(f"checkpoint {path} was not written by `specauf fit`: train one or give a z-lab directory")
    version = about.get("format", FORMAT)
    if version != FORMAT:
        raise UserError(
            f"checkpoint {path}: format {version} found, {FORMAT} expected; another version of specauf wrote it"
        )
    return checkpoint


# What torch.load raises for files that are cut short, overwritten or something else altogether.
_UNREADABLE = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    KeyError,
    IndexError,
    AttributeError,
    TypeError,
    OverflowError,
    MemoryError,
)


def drafter_state(checkpoint: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The drafter's part of a checkpoint's weights, by the drafter's own names."""
    prefix = "drafter."
    return {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
