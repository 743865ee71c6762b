"""Finds the files of each domain: in a data folder, or where the user names a folder for each."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mm_rec.data.documents.account import Account, tell_account
from mm_rec.data.documents.folder import Found, find_documents
from mm_rec.data.documents.kinds import kind_of, readable_endings
from mm_rec.data.manifest import MANIFEST
from mm_rec.errors import UserError
from mm_rec.storage.files import some_names
from mm_rec.translation import Translatable

__all__ = ["DomainFiles", "choose_root", "find_domains", "find_named"]

_OTHER_FOLDERS = ("prepared", "synthetic", "instruct", "chat", "questions")
"""Folders of a data folder that hold no documents to pre-train on."""

_HOW_TO_GET_DATA = (
    "get some with `python3 -m mm_rec.data.download_data --output_dir {data_dir}`, train with --download_data, put "
    "your own files into its folders text and code, or try --use_synthetic"
)


@dataclass(frozen=True)
class DomainFiles:
    """A domain's files, and the folder that their names are told from."""

    home: Path
    found: Found


def find_domains(
    data_dir: Path, domains: Sequence[str], skip: Sequence[Path], tell: Callable[[str], None]
) -> dict[str, DomainFiles]:
    """The documents of each domain that has some in ``data_dir``."""
    if not data_dir.is_dir():
        raise UserError(
            "there is no data folder {data_dir}; {remedy}",
            data_dir=data_dir,
            remedy=Translatable(_HOW_TO_GET_DATA, data_dir=data_dir),
        )
    there = [name for name in domains if (data_dir / name).is_dir()]
    found = {
        name: DomainFiles(data_dir, find_documents(data_dir / name, programs_only=name == "code")) for name in there
    }
    found = {name: one for name, one in found.items() if one.found.files}
    if found:
        # What lies beside the folders of the domains is named, but what other commands put there belongs there.
        others = [path for path in data_dir.iterdir() if path.is_file() and path.name != MANIFEST]
        loose = [path.name for path in others if kind_of(path) is not None and not path.name.startswith(".")]
        if loose:
            names = some_names(sorted(loose))
            tell(
                Translatable(
                    "not used, because they lie beside {found}: {names}; move them into one of these folders",
                    found=" and ".join(found),
                    names=names,
                )
            )
        return found
    not_documents = [data_dir / name for name in (MANIFEST, *_OTHER_FOLDERS, *domains)]
    whole = find_documents(data_dir, skip=[*not_documents, *skip])
    if not whole.files:
        raise UserError(
            "there is no data in {data_dir}; {remedy}",
            data_dir=data_dir,
            remedy=Translatable(_HOW_TO_GET_DATA, data_dir=data_dir),
        )
    return {domains[0]: DomainFiles(data_dir, whole)}


def find_named(
    folders: Mapping[str, Path], skip: Sequence[Path], tell: Callable[[str], None]
) -> dict[str, DomainFiles]:
    """The documents of each domain in the file or folder that is named for it."""
    found = {}
    for name, path in folders.items():
        one = find_documents(path, programs_only=name == "code", skip=[path / "prepared", *skip])
        if not one.files:
            tell_account(name, Account({}, one.left_out, []), True, tell)
            raise UserError(
                "there is no file that can be read in {path}; what is read are {endings}",
                path=path,
                endings=readable_endings(),
            )
        found[name] = DomainFiles(path if path.is_dir() else path.parent, one)
    return found


def choose_root(data_dir: Path, cache: Path | None, tell: Callable[[str], None]) -> Path:
    """Where prepared data go: into the data folder, unless nothing can be written there."""
    root = data_dir / "prepared"
    place = root if root.is_dir() else data_dir
    if cache is None or os.access(place, os.W_OK):
        return root
    tell(
        Translatable(
            "nothing can be written into {data_dir}, so the prepared data go to {cache}", data_dir=data_dir, cache=cache
        )
    )
    return cache
