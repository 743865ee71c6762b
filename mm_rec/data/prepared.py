"""A folder of prepared data: token stores, the tokenizer and a report; made once, named by what it is made of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mm_rec.data.pack import TokenStore
from mm_rec.errors import UserError
from mm_rec.storage.files import DamageError, remove_leftovers, reporting_errors, verify_folder
from mm_rec.storage.lock import Lock
from mm_rec.text.tokenizer import Tokenizer

__all__ = ["Prepared", "make_folder", "make_once", "tell_bad_rows", "write_report"]

_BAD_ROWS_TOLD = 10


@dataclass(frozen=True)
class Prepared:
    """Data ready to be trained on.

    Attributes:
        path: the folder that holds it.
        tokenizer: trained on it, or the one that was given.
        train: a store for each domain that has data.
        valid: held-out documents of the same domains.
        data_sha256: hash of the tokens of all stores.
        recall: rows that train recall, made of the training documents, for domains that have some.
        report: what was read, left out and made; :func:`mm_rec.data.prepare.describe` puts it into words.
    """

    path: Path
    tokenizer: Tokenizer
    train: dict[str, TokenStore]
    valid: dict[str, TokenStore]
    data_sha256: str
    report: dict[str, Any]
    recall: dict[str, TokenStore] = field(default_factory=dict)


def make_once(root: Path, settings: dict[str, Any], make: Callable[[Path], None], *, verify: bool = False) -> Prepared:
    """Returns the data that ``make`` writes, or wrote earlier, for ``settings``; see :func:`make_folder`."""
    return _open(make_folder(root, settings, make, verify=verify))


def make_folder(root: Path, settings: dict[str, Any], make: Callable[[Path], None], *, verify: bool = False) -> Path:
    """Returns the folder of ``root`` that ``make`` writes, or wrote earlier, for ``settings``; their hash names it.

    Two processes may call this at once; the second waits.

    Args:
        root: the folder of folders.
        settings: everything that the result depends on, as values that JSON can hold.
        make: writes the folder that it is given, whole or not at all.
        verify: compare what is used again with its SHA-256, not only its size.
    """
    identity = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    with reporting_errors(root):
        root.mkdir(parents=True, exist_ok=True)
    path = root / identity[:16]
    lock = Lock(root / "lock", wait=True)
    try:
        remove_leftovers(root)
        if not path.exists():
            make(path)
        elif verify:
            _verify(path)
    finally:
        lock.release()
    return path


def write_report(folder: Path, tokenizer: Tokenizer, entries: dict[str, Any]) -> None:
    """Write the tokenizer and ``report.json`` beside the token stores in ``folder``.

    Args:
        folder: the folder that is being made.
        tokenizer: the tokenizer of the stores.
        entries: by domain, what was read, left out and written, as values that JSON can hold.
    """
    tokenizer.save(folder / "tokenizer")
    report = {"tokenizer": tokenizer.sha256, "vocab_size": tokenizer.vocab_size, "domains": entries}
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def tell_bad_rows(found: list[str], tell: Callable[[str], None]) -> None:
    """Tell the first rows that were left out, by file and line."""
    for line in found[:_BAD_ROWS_TOLD]:
        tell(f"left out {line}")
    if len(found) > _BAD_ROWS_TOLD:
        tell(f"and {len(found) - _BAD_ROWS_TOLD:,} more")


def _verify(path: Path) -> None:
    try:
        verify_folder(path)
    except DamageError as error:
        raise UserError(f"{error}; delete {path}, the next run makes it anew") from error


def _open(path: Path) -> Prepared:
    try:
        report = json.loads((path / "report.json").read_bytes())
        names = list(report["domains"])
        tokenizer = Tokenizer.load(path / "tokenizer")
        intact = report["tokenizer"] == tokenizer.sha256
    except (OSError, ValueError, KeyError, TypeError, UserError):
        intact = False
    if not intact:
        raise UserError(f"{path} is damaged; delete it, the next run makes it anew")
    train, valid = ({name: TokenStore.open(path / f"{name}-{split}") for name in names} for split in ("train", "valid"))
    hashes = [[name, train[name].sha256, valid[name].sha256] for name in sorted(names)]
    data_sha256 = hashlib.sha256(json.dumps(hashes).encode()).hexdigest()
    return Prepared(path, tokenizer, train, valid, data_sha256, report)
