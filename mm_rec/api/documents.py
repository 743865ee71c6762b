"""Documents given in Python as a data folder that training reads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mm_rec.config import DOMAINS, check_expert_name
from mm_rec.data.documents.reading import ReadOptions
from mm_rec.data.download.local import take_own
from mm_rec.errors import UserError
from mm_rec.storage.files import reporting_errors, write_atomic
from mm_rec.storage.lock import Lock

__all__ = ["Texts", "data_folder"]

Texts = str | Path | Iterable[str]
"""A path, or documents as strings."""


def data_folder(data: Texts | Mapping[str, Texts], root: Path) -> Path:
    """Returns the data folder that ``data`` names.

    Args:
        data: a folder, which is returned as it is; a file; documents as strings; or files, folders and documents by
            domain.
        root: where to make a folder for anything else, named by a hash of the texts, or of the paths.

    Raises:
        UserError: if there is no such path or document, or a domain can't have that name.
        TypeError: if what is given for a domain is neither a path nor documents.
    """
    if isinstance(data, str | Path) and _existing(data).is_dir():
        return Path(data)
    domains = dict(data) if isinstance(data, Mapping) else {DOMAINS[0]: data}
    for name in domains:
        check_expert_name(name)
    if not domains:
        raise UserError("there are no documents: the dict of domains is empty")
    contents = {
        name: str(_existing(one).resolve()) if isinstance(one, str | Path) else _json_lines(name, one)
        for name, one in domains.items()
    }
    folder = root / hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()[:16]
    with reporting_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with Lock(folder / ".lock", wait=True):  # another process may want the same
        for name, one in domains.items():
            if isinstance(one, str | Path):
                take_own(name, Path(one), ReadOptions(), folder, lambda line: None)
            else:
                (folder / name).mkdir(exist_ok=True)
                write_atomic(folder / name / "texts.jsonl", contents[name].encode())
    return folder


def _existing(path: str | Path) -> Path:
    """``path``, which must exist; an empty string would otherwise be the current folder."""
    if not str(path) or not Path(path).exists():
        raise UserError("there is no file or folder {path!r}; documents as strings are given as a list", path=str(path))
    return Path(path)


def _json_lines(domain: str, texts: Any) -> str:
    if isinstance(texts, bytes) or not isinstance(texts, Iterable):
        raise TypeError(f"{domain} must be a path or documents as strings, not of type {type(texts).__name__}")
    documents = list(texts)
    if not documents:
        raise UserError("there are no documents of {domain}: the list is empty", domain=domain)
    for index, text in enumerate(documents):
        if not isinstance(text, str):
            raise UserError(
                "document {index} of {domain} is a {kind}; documents are strings",
                index=index,
                domain=domain,
                kind=type(text).__name__,
            )
    return "".join(json.dumps(text) + "\n" for text in documents)
