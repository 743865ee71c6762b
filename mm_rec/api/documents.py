"""Documents given in Python as a data folder that training reads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from mm_rec.config import DOMAINS
from mm_rec.data.download.local import take_own
from mm_rec.errors import UserError
from mm_rec.storage.files import write_atomic

__all__ = ["Texts", "data_folder"]

Texts = str | Path | Iterable[str]
"""A path, or documents as strings."""


def data_folder(data: Texts | Mapping[str, Texts], root: Path) -> Path:
    """Returns the data folder that ``data`` names.

    Args:
        data: a folder, which is returned as it is; a file; documents as strings; or files, folders and documents by
            domain.
        root: where to make a folder, named by the hash of what is in it, for anything but a folder.

    Raises:
        UserError: if there is no such path, domain or document.
    """
    if isinstance(data, str | Path):
        path = Path(data)
        if path.is_dir():
            return path
        if not path.is_file():
            raise UserError(f"there is no file or folder {data}; documents as strings are given as a list")
    domains = dict(data) if isinstance(data, Mapping) else {DOMAINS[0]: data}
    unknown = [name for name in domains if name not in DOMAINS]
    if unknown or not domains:
        raise UserError(f"there is no domain {', '.join(map(repr, unknown))}; data are of {' or '.join(DOMAINS)}")
    contents = {
        name: str(Path(one).resolve()) if isinstance(one, str | Path) else _json_lines(name, one)
        for name, one in domains.items()
    }
    folder = root / hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()[:16]
    for name, one in domains.items():
        if isinstance(one, str | Path):
            take_own(name, Path(one), 0, folder, lambda line: None)
        else:
            (folder / name).mkdir(parents=True, exist_ok=True)
            write_atomic(folder / name / "texts.jsonl", contents[name].encode())
    return folder


def _json_lines(domain: str, texts: Iterable[str]) -> str:
    documents = list(texts)
    for index, text in enumerate(documents):
        if not isinstance(text, str):
            raise UserError(f"document {index} of {domain} is a {type(text).__name__}; documents are strings")
    return "".join(json.dumps(text) + "\n" for text in documents)
