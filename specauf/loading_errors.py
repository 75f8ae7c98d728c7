"""What transformers and the hub raise for a model that cannot be loaded, as one line."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError

from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError

from specauf.errors import UserError

_PLACE = "give {} with --target (of cache-builder --target.model)"


def _refused(error: BaseException | None) -> bool:
    """Whether the hub said that this user may not have it."""
    while error is not None and not isinstance(error, HfHubHTTPError):
        error = error.__cause__ or error.__context__
    return error is not None and getattr(error.response, "status_code", None) in (401, 403)


@contextlib.contextmanager
def one_line_errors(name: str, where: str | None) -> Iterator[None]:
    """Turn what transformers raises for a model that cannot be had into one line.

    Args:
        name: of the target.
        where: hub id, directory or package.

    Raises:
        UserError: with what was raised and a way out.
    """
    try:
        yield
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError, UnpicklingError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        said = lines[0] if lines else type(error).__name__
        text = " ".join(lines).lower()
        if "gated repo" in text or _refused(error):
            hint = (
                f"accept its licence at https://huggingface.co/{where} and run `huggingface-cli login` or set HF_TOKEN"
            )
        elif isinstance(error, ImportError):
            hint = "install what is named and run the command again"
        elif "offline" in text or "connect" in text or "couldn't reach" in text or "cached files" in text:
            hint = f"connect to huggingface.co once, unset HF_HUB_OFFLINE, or {_PLACE.format('a directory')}"
            if where is not None and not Path(where).exists():
                hint += f" (there is no {where} here)"
        else:
            hint = _PLACE.format("a hub id or a local directory with config, tokenizer and weights")
        raise UserError(f"target {name} ({where}) cannot be loaded: {said} -- {hint}") from error
