"""Upload an export folder to the Hugging Face Hub, with the login of `hf auth login`. Free of torch.

All of it is one commit, so that nobody loads the weights of one export with the config of another. An upload that
broke off is continued by repeating it: what the Hub's storage has already received is not sent again. That is chunks
with Xet, the default, and whole files without it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from popo_lite.errors import ExportError, UserInputError
from popo_lite.tools.export import REPORT_FILE

if TYPE_CHECKING:
    from huggingface_hub import HfApi, ModelInfo

CARD = "README.md"
STALE = (
    "*.safetensors", "*.safetensors.index.json", "*.gguf", "Modelfile", "pytorch_model*", "consolidated*",
    "adapter_model*", "adapter_config.json", "config.json", "generation_config.json", "params.json",
    "*quant*_config.json", "quantize_config.json",
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "spiece.model",
    "sentencepiece*.model", "tekken.json", "chat_template*", "additional_chat_templates/*",
)  # fmt: skip
"""Files of another model, to delete. An adapter beside a merged model would be applied twice on loading, and older
tokenizer files change the special tokens."""
MODEL_ID = re.compile(r'^model_id = ".*"$', re.MULTILINE)
"""The line in a card's example that says where the model is."""
LOADING = re.compile(r"from_pretrained\((base, )?model_id(?=[,)])")
"""The calls of a card's example that load from there."""
SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Upload:
    """Describe what goes where. `files` maps names to bytes; `card` replaces the content of README.md."""

    folder: Path
    repo_id: str
    revision: str | None
    files: Mapping[str, int]
    card: str


def plan_upload(folder: Path, repo_id: str, revision: str | None = None) -> Upload:
    """Read the folder and check its card, without network. Hidden files stay here.

    Raises UserInputError for a link, which could lead to any file of this machine, and for a card with wrong metadata.
    """
    from huggingface_hub import ModelCard
    from yaml import YAMLError  # type: ignore[import-untyped]

    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if any(part.startswith(".") for part in name.parts):
            continue
        if path.is_symlink():
            what, next_step = "it is a link, and only files of the export are uploaded", "replace it by the file itself"
            raise UserInputError(what, where=str(path), next_step=next_step)
        if path.is_file():
            files[name.as_posix()] = path.stat().st_size
    path = folder / CARD
    try:
        text = path.read_text(encoding="utf-8")
        card = MODEL_ID.sub(f'model_id = "{repo_id}"', text, count=1)
        if revision:
            card = LOADING.sub(lambda call: f"{call[0]}, revision={json.dumps(revision)}", card)
        ModelCard(card).data.to_yaml()
    # Metadata may be of any type at any place.
    except (OSError, ValueError, TypeError, KeyError, AttributeError, YAMLError) as error:
        what = f"the card is not valid: {' '.join(str(error).split())}"
        next_step = "correct its metadata, the lines between the two ---, or export again into another folder"
        raise UserInputError(what, where=str(path), next_step=next_step) from error
    files[CARD] = len(card.encode())
    return Upload(folder=folder, repo_id=repo_id, revision=revision, files=files, card=card)


def check_repo_id(repo_id: str, where: str) -> None:
    """Raise UserInputError for an invalid repository name."""
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, not in __all__

    try:
        if "/" not in repo_id:
            raise ValueError("it lacks the user or organisation")
        validate_repo_id(repo_id)
    except ValueError as error:
        what = f"{repo_id!r} is not the name of a repository: {error}"
        next_step = "write it as USER/NAME; `hf auth whoami` says who is logged in"
        raise UserInputError(what, where=where, next_step=next_step) from error


def check_login(where: str) -> None:
    """Raise UserInputError if there is no token. Whether the Hub accepts it is seen when it is used."""
    from huggingface_hub import get_token

    if get_token() is None:
        what, next_step = "nobody is logged in to the Hugging Face Hub", "hf auth login"
        raise UserInputError(what, where=where, next_step=f"{next_step}, with a token that may write")


def upload(
    plan: Upload, *, message: str, private: bool, may_replace: Callable[[Mapping[str, Any]], bool], where: str
) -> dict[str, Any]:
    """Make the repository, or the branch, if it is missing, and commit the files; return where they are.

    `may_replace` gets the export.json of the repository, or nothing of one that has other files.

    Raises ExportError if the Hub refuses or cannot be reached, for a private upload to a public repository, and if
    there is something that may not be replaced. Nothing is uploaded then, or not committed.
    """
    from httpx import HTTPError
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api, repo_id, revision = HfApi(), plan.repo_id, plan.revision
    try:
        # Without --private the owner's own default decides.
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        info, is_new = _state(api, repo_id, revision)
        if private and not info.private:
            what = f"{repo_id} exists and everybody can see it, so nothing was uploaded"
            next_step = "make it private on its settings page, or name another one"
            raise ExportError(what, where=where, next_step=next_step)
        there = {file.rfilename for file in info.siblings or ()} - {".gitattributes"}
        if there and not is_new:
            _refuse_to_replace(api, plan, info, there, may_replace, where)
        added = [CommitOperationAdd(name, plan.folder / name) for name in plan.files if name != CARD]
        stale = sorted(name for name in there - plan.files.keys() if any(fnmatch(name, pattern) for pattern in STALE))
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(CARD, plan.card.encode()), *added, *map(CommitOperationDelete, stale)],
            commit_message=message,
            revision=revision,
            parent_commit=info.sha,  # refused if somebody has changed what was looked at
        )
    # Uploads of large files wrap what went wrong in a RuntimeError, and refused batches come as a ValueError.
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        what, next_step = explained(error, plan.folder)
        raise ExportError(what, where=where, next_step=next_step) from error
    url = f"{api.endpoint}/{repo_id}" + (f"/tree/{revision}" if revision else "")
    return {"url": url, "private": bool(info.private), "commit": commit.oid, "deleted": stale}


def _state(api: HfApi, repo_id: str, revision: str | None) -> tuple[ModelInfo, bool]:
    """Return what is in the repository or branch, and True if the branch was made here, as a copy of main."""
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        return api.model_info(repo_id, revision=revision), False
    except RevisionNotFoundError:
        api.create_branch(repo_id, branch=str(revision))
        return api.model_info(repo_id, revision=revision), True


def _refuse_to_replace(
    api: HfApi,
    plan: Upload,
    info: ModelInfo,
    there: set[str],
    may_replace: Callable[[Mapping[str, Any]], bool],
    where: str,
) -> None:
    """Raise ExportError if the repository holds something that may not be replaced."""
    found: dict[str, Any] = {}
    if REPORT_FILE in there:
        path = Path(api.hf_hub_download(plan.repo_id, REPORT_FILE, revision=info.sha))
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            found = content if isinstance(content, dict) else {}
        except (ValueError, RecursionError):  # made by something else
            found = {}
    if may_replace(found):
        return
    names = ", ".join(sorted(there)[:SHOWN]) + (f" and {len(there) - SHOWN} more" if len(there) > SHOWN else "")
    is_ours = isinstance(found.get("adapter_sha256"), str)
    step = f" after {found['checkpoint']} steps" if found.get("checkpoint") else ""
    kind = found.get("gguf") or found.get("what")
    held = (
        f"another export of popo-lite ({kind}, {found.get('weights')}{step}, of {found.get('base')})"
        if is_ours
        else "files"
    )
    what = f"{plan.repo_id} already holds {held}: {names}; nothing was uploaded"
    next_step = "name another repository or a --revision, or replace its model and card with --overwrite"
    raise ExportError(what, where=where, next_step=next_step)


def explained(error: BaseException, folder: Path) -> tuple[str, str]:
    """Return what the library's error, or the error that it wraps, means, and what to do."""
    from httpx import TransportError
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    status, said = None, " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, HfHubHTTPError):
        status, said = error.response.status_code, error.server_message or said
    again = "then the same command again, which continues"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE forbids it", f"set HF_HUB_OFFLINE=0, {again}"
    if isinstance(error, TransportError) or said.startswith("Network error"):  # of Xet, which is not httpx
        return f"the Hub cannot be reached ({type(error).__name__}: {said})", f"check the network, {again}"
    if said.startswith("Invalid metadata"):
        return f"the Hub refused the card: {said}", f"correct {folder / CARD}, {again}"
    if status == 401:
        return f"the Hub does not know this login: {said}", f"hf auth login, {again}"
    if status in (402, 403, 413, 507) and re.search(r"storage|quota|billing|payment|too large", said, re.IGNORECASE):
        return (
            f"the account's storage is full: {said}",
            f"free some at https://huggingface.co/settings/billing, {again}",
        )
    if status == 403:
        return f"this login may not write there: {said}", f"hf auth login with a token that may write, {again}"
    if status in (409, 412):
        return f"the repository was changed meanwhile: {said}", "rerun the same command"
    if status == 429:
        return f"the Hub gets too many requests from here: {said}", f"wait some minutes, {again}"
    return f"the Hub refused: {said}", f"see https://status.huggingface.co, {again}"
