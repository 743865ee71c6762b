"""A folder of prepared data: token stores, the tokenizer and a report; made once, named by what it is made of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mm_rec.data.origins import ORIGINS, Origin
from mm_rec.data.pack import STORE_FILES, TokenStore
from mm_rec.errors import UserError
from mm_rec.storage.files import MANIFEST, DamageError, Entry, read_manifest, remove_leftovers, reporting_errors
from mm_rec.storage.lock import Lock
from mm_rec.storage.reading import read_file
from mm_rec.text.tokenizer import Tokenizer
from mm_rec.translation import Translatable

__all__ = [
    "Prepared",
    "PreparedFacts",
    "StoreFolder",
    "make_folder",
    "make_once",
    "open_folder",
    "open_prepared",
    "read_facts",
    "tell_bad_rows",
    "write_report",
]

TOKENIZER = "tokenizer/tokenizer.json"
_INDEX = "index.json"
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

    @property
    def documents_sha256(self) -> str:
        """The ``data_sha256`` of the documents alone, without rows that train recall."""
        return _sha256_of(self.train, self.valid)


class StoreFolder(NamedTuple):
    """A folder of token stores that :func:`make_folder` made.

    Attributes:
        report: what its ``report.json`` says.
        tokenizer: the one that lies in it, if there is one.
        stores: the token stores, by their names in it.
    """

    report: dict[str, Any]
    tokenizer: Tokenizer | None
    stores: dict[str, TokenStore]


def make_once(
    root: Path,
    settings: dict[str, Any],
    make: Callable[[Path], None],
    tell: Callable[[str], None],
    earlier: dict[str, Any] | None = None,
) -> Prepared:
    """Returns the data that ``make`` writes, or wrote earlier, for ``settings``; see :func:`make_folder`."""
    return open_prepared(make_folder(root, settings, make, tell, earlier))


def make_folder(
    root: Path,
    settings: dict[str, Any],
    make: Callable[[Path], None],
    tell: Callable[[str], None],
    earlier: dict[str, Any] | None = None,
) -> Path:
    """Returns the folder of ``root`` that ``make`` writes, or wrote earlier, for ``settings``; their hash names it.

    Two processes may call this at once; the second waits.

    Args:
        root: the folder of folders.
        settings: everything that the result depends on, as values that JSON can hold.
        make: writes the folder that it is given, whole or not at all.
        tell: takes a line if another process has to be waited for.
        earlier: the settings of an earlier version, whose folder is used if it is there.

    Raises:
        UserError: if what was made earlier is not, byte for byte, what was written.
    """
    with reporting_errors(root):
        root.mkdir(parents=True, exist_ok=True)
    path = root / _name_of(settings)
    if earlier is not None and (root / _name_of(earlier)).exists():
        path = root / _name_of(earlier)
    with Lock(
        root / "lock",
        wait=True,
        on_wait=lambda owner: tell(
            Translatable("waiting for {owner}, which prepares data in {root}", owner=owner, root=root)
        ),
    ):
        remove_leftovers(root)
        if not path.exists():
            make(path)
    return path


def _name_of(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def open_prepared(path: Path) -> Prepared:
    """Returns the prepared data in the folder ``path`` after comparing all of it with its hashes.

    Raises:
        UserError: naming the file that is missing or not what was written.
    """
    report, tokenizer, stores = open_folder(path)
    with _naming_the_remedy(path):
        if tokenizer is None:
            raise DamageError("{path} has no tokenizer", path=path)
        train, valid = ({name: stores[f"{name}-{split}"] for name in report["domains"]} for split in ("train", "valid"))
    return Prepared(path, tokenizer, train, valid, _sha256_of(train, valid), report)


def _sha256_of(train: Mapping[str, TokenStore], valid: Mapping[str, TokenStore]) -> str:
    return _sha256_of_stores([[name, train[name].sha256, valid[name].sha256] for name in sorted(train)])


def _sha256_of_stores(hashes: list[list[str]]) -> str:
    """The hash of stores: each has its name and the hashes of its indexes for training and validation."""
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


def open_folder(path: Path) -> StoreFolder:
    """Returns what is in a folder of token stores after comparing all of it with its hashes.

    Raises:
        UserError: naming the file that is missing or not what was written.
    """
    with _naming_the_remedy(path):
        entries = read_manifest(path)
        small = [name for name in entries if name.rpartition("/")[2] not in STORE_FILES]
        contents = {name: read_file(path / name, entries[name]) for name in small}
        report = json.loads(contents["report.json"])
        tokenizer = Tokenizer.parse(contents[TOKENIZER], path / TOKENIZER) if TOKENIZER in contents else None
        if tokenizer is not None and (report["tokenizer"], report["vocab_size"]) != (
            tokenizer.sha256,
            tokenizer.vocab_size,
        ):
            raise DamageError(
                "{path} is not the tokenizer that {report} names", path=path / TOKENIZER, report=path / "report.json"
            )
        names = [name.removesuffix(f"/{_INDEX}") for name in entries if name.endswith(f"/{_INDEX}")]
        stores = {name: TokenStore.open(path / name, vocab_size=report["vocab_size"], prepared=path) for name in names}
        for name, store in stores.items():
            _compare(path, entries, name, contents[f"{name}/{_INDEX}"], store)
    return StoreFolder(report, tokenizer, stores)


def _compare(path: Path, entries: Mapping[str, Entry], name: str, index: bytes, store: TokenStore) -> None:
    """Raise DamageError unless the manifest, the ``index`` that it names and the ``store`` that was opened are one."""
    if store.sha256 != entries[f"{name}/{_INDEX}"]["sha256"]:
        raise DamageError("{path} is damaged: it is not what the manifest says", path=path / name / _INDEX)
    if any(entries[f"{name}/{file}"] != entry for file, entry in json.loads(index)["files"].items()):
        raise DamageError(
            "{path} is damaged: it is not what {name}/{index} says", path=path / MANIFEST, name=name, index=_INDEX
        )


@contextmanager
def _naming_the_remedy(path: Path) -> Iterator[None]:
    """Turns what can be wrong with the prepared folder ``path`` into an error that says what to do about it."""
    try:
        yield
    except (DamageError, KeyError, ValueError, TypeError) as error:
        why = (
            error
            if isinstance(error, DamageError)
            else Translatable("{path} is not a folder of prepared data ({error})", path=path, error=error)
        )
        raise UserError("{why}; delete {path}, the next run makes it anew", why=why, path=path) from error


class PreparedFacts(NamedTuple):
    """What prepared data say of themselves, without a look at their tokens.

    Attributes:
        report: what ``report.json`` says, by domain.
        origins: where downloaded files come from, by domain; see :mod:`mm_rec.data.origins`.
        documents_sha256: as of :class:`Prepared`.
    """

    report: dict[str, Any]
    origins: dict[str, list[Origin]]
    documents_sha256: str


def read_facts(path: Path) -> PreparedFacts:
    """Returns what the prepared data in the folder ``path`` say of themselves.

    Raises:
        UserError: naming the file that is missing or not what was written.
    """
    with _naming_the_remedy(path):
        entries = read_manifest(path)
        report = json.loads(read_file(path / "report.json", entries["report.json"]))
        origins = json.loads(read_file(path / ORIGINS, entries[ORIGINS])) if ORIGINS in entries else {}
        stores = [
            [name, *(str(entries[f"{name}-{split}/{_INDEX}"]["sha256"]) for split in ("train", "valid"))]
            for name in sorted(report["domains"])
        ]
    return PreparedFacts(report["domains"], origins, _sha256_of_stores(stores))


def write_report(folder: Path, tokenizer: Tokenizer, entries: dict[str, Any]) -> None:
    """Write the tokenizer and ``report.json`` beside the token stores in ``folder``.

    Args:
        folder: the folder that is being made.
        tokenizer: the tokenizer of the stores.
        entries: by domain, what was read, left out and written, as values that JSON can hold.
    """
    tokenizer.save(folder / "tokenizer")
    report = {"tokenizer": tokenizer.sha256, "vocab_size": tokenizer.vocab_size, "domains": entries}
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8", newline="\n")


def tell_bad_rows(found: list[str], tell: Callable[[str], None]) -> None:
    """Tell the first rows that were left out, by file and line."""
    for line in found[:_BAD_ROWS_TOLD]:
        tell(Translatable("left out {line}", line=line))
    if len(found) > _BAD_ROWS_TOLD:
        tell(Translatable("and {count:,} more", count=len(found) - _BAD_ROWS_TOLD))
