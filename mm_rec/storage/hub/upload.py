"""Uploading an exported folder to a hub, in one commit."""

from __future__ import annotations

import functools
from pathlib import Path

from mm_rec.errors import MissingPackageError, UserError
from mm_rec.storage.hub.client import causes, explaining, first_line, hub_address, reach_problem, status_of, within
from mm_rec.storage.hub.names import require_repository
from mm_rec.translation import Translatable

__all__ = ["require_login", "upload_folder"]

_CREATE_SECONDS = 30.0
"""The longest wait for the hub to make a repository."""

_STALE = ["*.safetensors", "*.safetensors.index.json"]
"""Weights of an earlier upload, which are deleted where the new one has no file of that name."""


def require_login(repository: str) -> None:
    """Refuse what an upload to ``repository`` cannot do, before anything is exported.

    Raises:
        UserError: if the name is none, `huggingface_hub` is missing, or nobody is logged in.
    """
    require_repository(repository)
    try:
        from huggingface_hub import get_token
    except ImportError:
        raise MissingPackageError("--push", "huggingface_hub") from None
    if get_token() is None:
        raise UserError(
            "--push needs a token that may write: set HF_TOKEN to one from https://huggingface.co/settings/tokens, or "
            "log in with `hf auth login`"
        )


def upload_folder(folder: Path, repository: str, *, public: bool) -> str:
    """Uploads all files of ``folder`` and returns a line that says where they are, and who sees them.

    Args:
        folder: as `mm-rec export` writes it.
        repository: ``owner/name``; made if it is not there. One that is private stays private.
        public: whether everybody may see a new model; without it, a repository that is public is refused.

    Raises:
        UserError: if the hub cannot be reached or refuses. The folder stays.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    kept = Translatable("the exported folder {folder} is kept", folder=folder)
    with explaining(functools.partial(_explained, repository, folder, kept)):
        within(_CREATE_SECONDS, lambda: api.create_repo(repository, private=not public, exist_ok=True))
        is_private = bool(api.model_info(repository).private)
        if not is_private and not public:
            raise UserError(
                "{repository} is public, and --public was not given; {kept}: to let everybody see it, upload it with "
                "`hf upload {repository} {folder}`",
                repository=repository,
                kept=kept,
                folder=folder,
            )
        api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Upload a model of MM-Rec", delete_patterns=_STALE
        )
    return Translatable(
        "uploaded to {hub}/{repository}, which is private"
        if is_private
        else "uploaded to {hub}/{repository}, which is public",
        hub=hub_address(),
        repository=repository,
    )


def _explained(repository: str, folder: Path, kept: str, error: Exception) -> UserError | None:
    """Returns what an error of the hub's client means to a user; None for a bug."""
    for cause in causes(error):
        status = status_of(cause)
        if status in (401, 403, 404):
            return UserError(
                "the hub at {hub} does not let you write to {repository} (status {status}); check the owner, and that "
                "the token in HF_TOKEN or from `hf auth login` may write; {kept}",
                hub=hub_address(),
                repository=repository,
                status=status,
                kept=kept,
            )
        if problem := reach_problem(cause):
            return UserError(
                "{problem}; {kept}, so upload it later with `hf upload {repository} {folder}`",
                problem=problem,
                kept=kept,
                repository=repository,
                folder=folder,
            )
    if isinstance(error, ValueError):
        return UserError(
            "the hub at {hub} refuses {repository}: {error}; {kept}",
            hub=hub_address(),
            repository=repository,
            error=first_line(error),
            kept=kept,
        )
    return None
