"""Upload an export to a repository of the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from mim_refiner.errors import InputError, reason_of

_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def check_repository(repository: str) -> None:
    """Raise InputError unless this reads "owner/name"."""
    if not _NAME.fullmatch(repository):
        raise InputError(f"--push-to-hub {repository}: write the repository as owner/name")


def push_to_hub(folder: str | Path, repository: str, *, private: bool = False) -> str:
    """Create ``repository`` ("owner/name") where it does not exist, and upload the files of ``folder`` in one commit.

    Server and token are those of huggingface_hub (HF_ENDPOINT; HF_TOKEN, or a login). Returns the address of the
    repository. Raises InputError when the server cannot be reached or refuses; ``folder`` stays as it is.
    """
    check_repository(repository)
    api = HfApi(library_name="mim-refiner")
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=str(address.repo_id), folder_path=str(folder), commit_message="Encoder exported by mim-refiner"
        )
    except Exception as error:  # the client raises its own, httpx's and OSError
        raise InputError(
            f"--push-to-hub {repository}: {_reason(error)}; the export is complete in {folder}, "
            f"to upload it later, run: hf upload {repository} {folder}"
        ) from error
    return str(address)


def _reason(error: Exception) -> str:
    if isinstance(error, OfflineModeIsEnabled):
        return "offline mode is on (HF_HUB_OFFLINE), so nothing was uploaded"
    if isinstance(error, LocalTokenNotFoundError):
        return "no token; set HF_TOKEN or log in with: hf auth login"
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        status = error.response.status_code
        advice = "; set HF_TOKEN to one that may write there, or log in with: hf auth login"
        return f"the hub refused with status {status}{advice if status in (401, 403) else ''}"
    return f"the hub cannot be reached or failed ({type(error).__name__}: {reason_of(error)})"
