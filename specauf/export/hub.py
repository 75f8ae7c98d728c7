"""Uploading an export to the Hugging Face hub."""

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from specauf.errors import UserError

# The hub's client changed its HTTP library more than once; its own error's bases are that library's.
_FAILURES: tuple[type[BaseException], ...] = (HfHubHTTPError, *HfHubHTTPError.__bases__, OSError)


def check_can_push(repository: str) -> None:
    """Refuse what an upload would fail on, before anything is written.

    Raises:
        UserError: the id is malformed, or no token is there.
    """
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"push_to_hub: {repository!r} is no repository id ({reason}): give OWNER/NAME") from error
    if get_token() is None:
        raise UserError("push_to_hub: no token found: run `hf auth login` or set HF_TOKEN, then export again")


def push(directory: Path, repository: str) -> str:
    """Upload a directory as a model repository, made if need be; returns its address.

    Raises:
        UserError: the hub refused or could not be reached; the directory is kept.
    """
    api: Any = HfApi()
    try:
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=directory, commit_message="specauf export")
    except _FAILURES as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"push_to_hub: {repository} not uploaded ({reason}); the export is whole in {directory}, "
            f"upload it with `hf upload {repository} {directory}`"
        ) from error
    return f"https://huggingface.co/{repository}"
