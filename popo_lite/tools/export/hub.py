"""Upload an export to the Hugging Face Hub, with the login of `hf auth login`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from popo_lite.errors import ExportError, UserInputError
from popo_lite.tools.export.card import CARD_FILE

WEIGHT_FILES = (
    "model*.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
    "adapter_config.json",
)
"""What an earlier push may have left behind; an adapter beside a merged model would be applied twice on loading."""


@dataclass(frozen=True, kw_only=True)
class Upload:
    """What was uploaded, and who can see it."""

    repo_id: str
    private: bool
    url: str
    commit: str


def check_repo_id(repo_id: str) -> None:
    """Raise UserInputError if `repo_id` is not a `user/name` that the Hub takes."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, though not in __all__

    reason = "it lacks the user or organisation" if "/" not in repo_id else None
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        reason = str(error)
    if reason is not None:
        raise UserInputError(
            f"not the name of a repository: {reason}",
            where=f"--push-to-hub {repo_id}",
            next_step="write it as user/name; `hf auth whoami` says who is logged in",
        )


def name_in_card(folder: Path, repo_id: str) -> str:
    """Make `repo_id` what the example of the folder's model card loads, and return the card. Other edits are kept."""
    path = folder / CARD_FILE
    line = f'model_id = "{repo_id}"'
    card = re.sub(r'^model_id = ".*"$', line, path.read_text(encoding="utf-8"), count=1, flags=re.MULTILINE)
    path.write_text(card, encoding="utf-8")
    return card


def push(folder: Path, repo_id: str, *, private: bool) -> Upload:
    """Upload `folder`, card included, to `repo_id`, which is created if it does not exist.

    Weights of an earlier push are replaced. Raises ExportError if the Hub refuses or cannot be reached, or
    if a private upload is requested and the repository is public. The folder is kept in any case.
    """
    from httpx import HTTPError
    from huggingface_hub import HfApi

    name_in_card(folder, repo_id)
    api = HfApi()
    try:
        # Without --private the owner's own default decides.
        api.create_repo(repo_id, private=True if private else None, exist_ok=True)
        is_private = bool(api.model_info(repo_id).private)
        if private and not is_private:
            raise ExportError(
                f"{repo_id} exists and everybody can see it, so nothing was uploaded",
                where=f"--push-to-hub {repo_id} --private",
                next_step=f"make it private on its settings page, or name another one; the export is in {folder}",
            )
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message="Upload by popo-lite export",
            delete_patterns=list(WEIGHT_FILES),
        )
    # Uploads of large files wrap what went wrong in a RuntimeError, and refused batches come as a ValueError.
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise _refused(error, folder, repo_id) from error
    return Upload(repo_id=repo_id, private=is_private, url=f"{api.endpoint}/{repo_id}", commit=commit.oid)


def _refused(error: BaseException, folder: Path, repo_id: str) -> ExportError:
    """Return an ExportError that explains the library's error, or the error that it wraps."""
    from httpx import TransportError
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status == 401:
        what, next_step = "the Hub knows no such login", "hf auth login, then the same command again"
    elif status == 403:
        what = "this login may not write there"
        next_step = "hf auth login with a token that may write, or a name of your own; then the same command again"
    elif isinstance(error, OfflineModeIsEnabled):
        what, next_step = "HF_HUB_OFFLINE forbids it", "HF_HUB_OFFLINE=0 and the same command again"
    elif isinstance(error, TransportError):
        what = f"the Hub cannot be reached ({type(error).__name__}: {error})"
        next_step = "check the network, then the same command again"
    else:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        what, next_step = f"the Hub refused: {reason}", "see https://status.huggingface.co, then the same command again"
    return ExportError(f"{what}; the export is kept in {folder}", where=f"--push-to-hub {repo_id}", next_step=next_step)
