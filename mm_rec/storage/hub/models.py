"""Fetching a model from a hub into the cache that `huggingface_hub` keeps.

Only the files that hold a model are fetched: its configuration, weights in safetensors and its tokenizer. Nothing that
a program would run is among them. What is fetched is read by the same code as any folder that `transformers` saved.
"""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mm_rec.errors import MissingPackageError, UserError
from mm_rec.regular_file import open_regular
from mm_rec.storage import checkpoint, hf_folder
from mm_rec.storage.files import format_bytes, reporting_errors, require_space
from mm_rec.storage.hub.client import (
    DEADLINE_SECONDS,
    causes,
    explaining,
    first_line,
    hub_address,
    reach_problem,
    status_of,
    within,
)
from mm_rec.storage.hub.names import HubName, parse_hub_name
from mm_rec.translation import Translatable, translate

__all__ = ["find_model", "is_fetched"]

_FETCHED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
)
"""Patterns of the files that are fetched, in the top folder of a repository."""
_TIMEOUT_SECONDS = 5

Tell = Callable[[str], None]


def is_fetched(file: str) -> bool:
    """Returns whether a file of a repository is of a kind that is fetched.

    >>> is_fetched("model-00001-of-00002.safetensors"), is_fetched("modeling_mm_rec.py"), is_fetched("model.bin")
    (True, False, False)
    """
    return "/" not in file and any(fnmatchcase(file, pattern) for pattern in _FETCHED)


def _say(line: str) -> None:
    sys.stderr.write(f"{translate(line)}\n")
    sys.stderr.flush()


def find_model(path: Path, tell: Tell = _say) -> Path:
    """Returns the folder that ``path`` names: itself if it exists, else that of the model fetched from the hub.

    Without an answer of the hub, or with HF_HUB_OFFLINE, it is what was fetched before.

    Args:
        path: a folder, or ``owner/name`` or ``owner/name@revision`` on the hub that HF_ENDPOINT names.
        tell: takes a line about what is fetched, by default written to standard error.

    Raises:
        UserError: if there is neither a folder nor such a model, or it cannot be fetched.
    """
    name = None if path.exists() else parse_hub_name(path)
    if name is None:
        return path
    try:
        import huggingface_hub  # noqa: F401 (is it installed)
    except ImportError:
        what = Translatable("there is no folder {path}, and fetching a model from a hub", path=path)
        raise MissingPackageError(what, "huggingface_hub") from None
    return _fetch(name, tell)


def _fetch(name: HubName, tell: Tell) -> Path:
    """Returns the folder of the model ``name`` in the cache, fetched as far as it is not there."""
    from huggingface_hub import constants

    with explaining(functools.partial(_explained, name)):
        try:
            info = within(DEADLINE_SECONDS, lambda: _ask(name))
        except Exception as error:
            problem = next(filter(None, map(reach_problem, causes(error))), None)
            if problem is None or (status_of(error) or 500) < 500:
                raise
            folder = _fetched_before(name)
            if folder is None:
                raise UserError(
                    "there is no folder {name}, {problem}, and {name} was not fetched completely before; try the same "
                    "command again with a network, set HF_ENDPOINT to a mirror, or name a folder",
                    name=name,
                    problem=problem,
                ) from error
            if not constants.HF_HUB_OFFLINE:
                tell(Translatable("{problem}; taking {name} as it was fetched before", problem=problem, name=name))
            return folder
        with reporting_errors(Path(constants.HF_HUB_CACHE)):
            return _download(name, info, tell)


def _ask(name: HubName) -> Any:
    """Returns what the hub says of a model: its commit and its files with their sizes."""
    from huggingface_hub import HfApi

    return HfApi().model_info(name.repository, revision=name.revision, files_metadata=True, timeout=_TIMEOUT_SECONDS)


def _download(name: HubName, info: Any, tell: Tell) -> Path:
    """Fetches the files of a model that are not in the cache; the small one that says what it is comes first."""
    from huggingface_hub import constants, hf_hub_download, snapshot_download, try_to_load_from_cache

    files = [one for one in info.siblings if is_fetched(one.rfilename)]
    names = [one.rfilename for one in files]
    absent = [one for one in (hf_folder.CONFIG, hf_folder.TOKENIZER) if one not in names]
    if not {hf_folder.WEIGHTS, hf_folder.INDEX} & set(names):
        absent.append(hf_folder.WEIGHTS)
    if absent:
        raise UserError(
            "{name} at {hub} is no model of MM-Rec: it has no {file}; name another one, or, if it is yours, upload it "
            "again with `mm-rec export --push`",
            name=name,
            hub=hub_address(),
            file=absent[0],
        )
    cached = {one: try_to_load_from_cache(name.repository, one, revision=info.sha) for one in names}
    missing = [one for one in files if not isinstance(cached[one.rfilename], str)]
    if missing:
        n_bytes = sum(one.size or 0 for one in missing)
        tell(
            Translatable(
                "fetching {name} from {hub}: {count} files, {size}",
                name=name,
                hub=hub_address(),
                count=len(missing),
                size=format_bytes(n_bytes),
            )
        )
        config = hf_hub_download(name.repository, hf_folder.CONFIG, revision=name.revision)
        checkpoint.require_own_model(Path(config).parent)
        require_space(Path(constants.HF_HUB_CACHE), n_bytes)
    folder = Path(snapshot_download(name.repository, revision=name.revision, allow_patterns=names))
    for one in missing:
        _check_hash(folder / one.rfilename, one)
    return folder


def _check_hash(path: Path, entry: Any) -> None:
    """Compares a file that was fetched with the hash that the hub states for large files; removes it if they differ."""
    if entry.lfs is None:
        return
    with open_regular(path) as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != entry.lfs.sha256:
        blob = path.resolve()
        path.unlink()
        blob.unlink(missing_ok=True)
        raise UserError(
            "{name} arrived damaged and was removed; try the same command again, which fetches it anew", name=path.name
        )


def _fetched_before(name: HubName) -> Path | None:
    """Returns the folder of a model in the cache; None if it is not there or not whole."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(
                name.repository, revision=name.revision, local_files_only=True, allow_patterns=list(_FETCHED)
            )
        )
    except LocalEntryNotFoundError:
        return None
    return folder if hf_folder.is_complete(folder) else None


def _explained(name: HubName, error: Exception) -> UserError | None:
    """Returns what an error of the hub's client means to a user; None for a bug."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    for cause in causes(error):
        if isinstance(cause, GatedRepoError):
            return UserError(
                "{name} is gated: accept its terms at {hub}/{repository} and set HF_TOKEN to a token of yours, or log "
                "in with `hf auth login`",
                name=name,
                hub=hub_address(),
                repository=name.repository,
            )
        if isinstance(cause, RevisionNotFoundError):
            return UserError(
                "{repository} at {hub} has no revision {revision}; name a branch, a tag or a commit that it has after "
                "the @",
                repository=name.repository,
                hub=hub_address(),
                revision=name.revision or "main",
            )
        if isinstance(cause, RepositoryNotFoundError):
            return UserError(
                "there is no folder {name}, and the hub at {hub} has no model {repository} that you may read; check "
                "the spelling, HF_ENDPOINT and, for a private model, HF_TOKEN",
                name=name,
                hub=hub_address(),
                repository=name.repository,
            )
    for cause in causes(error):
        if status_of(cause) in (401, 403):
            return UserError(
                "the hub at {hub} refuses {name} (status {status}); check HF_TOKEN, or log in with `hf auth login`",
                hub=hub_address(),
                name=name,
                status=status_of(cause),
            )
        if problem := reach_problem(cause):
            return UserError("{problem}; try the same command again", problem=problem)
    if isinstance(error, ValueError | OSError):
        return UserError(
            "{name} cannot be fetched from {hub}: {error}; try the same command again",
            name=name,
            hub=hub_address(),
            error=first_line(error),
        )
    return None
