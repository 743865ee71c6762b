"""The version numbers of everything that is written to disk and read again.

Whoever changes what a file holds, or what its numbers mean, raises the number of its format in :data:`VERSIONS` by
one. Files of every other number then end in one line that says what still works. A number that is to be read further
on needs a conversion where the file is read, before :func:`check_version`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mm_rec
from mm_rec.errors import UserError
from mm_rec.translation import Translatable

__all__ = ["FIRST_VERSION", "KEY", "VERSIONS", "FormatError", "check_version", "is_current", "take_version"]

VERSIONS = {
    # model.safetensors, config.json and the tokenizer, of checkpoints and exported folders; written in config.json
    "model": 4,
    # optimizer.safetensors, carried.safetensors and trainer.json of checkpoints; written in trainer.json. Carried
    # states and sessions hold what mm_rec/state.py lays out: a change there raises both numbers
    "training": 4,
    # the file of a chat session; written in its settings
    "session": 4,
    # a folder of prepared data, and whatever makes the same input come out differently: part of the identity that
    # names the folder, so that one of another number is not opened but made anew beside it. Folders of documents of
    # number 4 are used again (mm_rec/data/prepare.py)
    "documents": 5,
    "conversations": 2,
    # what the readers make of files of other kinds than JSONL and Parquet: part of that identity if there are some
    "document readers": 1,
    # the same of a folder of rows that train recall
    "recall rows": 3,
    # one split of prepared data; written in index.json
    "token store": 1,
    # manifest.json of a written folder, where another number counts as damage, and of downloaded data
    "manifest": 1,
    "download manifest": 1,
}

KEY = "format"
"""Where a JSON object states its version."""

FIRST_VERSION = 1
"""Of a model or training state that states no version, as before there were such numbers."""

_STILL_WORKS = {
    "model": Translatable("the version of MM-Rec that wrote it still runs, trains and exports it"),
    "training": Translatable(
        "its weights can still be used: --init_from starts a new run from them, and "
        "generate, chat and export take them as they are"
    ),
    "session": Translatable("the version of MM-Rec that wrote it still continues it, and a new session can be started"),
    "token store": Translatable("delete it, the next run makes it anew"),
}
_LONGEST_SHOWN = 20


class FormatError(UserError):
    """A file is whole but of another version of its format; the message names it and what still works."""


def is_current(kind: str, found: object) -> bool:
    """Whether ``found``, any value that JSON can hold, is the number that :data:`VERSIONS` has for ``kind``.

    >>> is_current("session", 4), is_current("session", True), is_current("session", 4.0)
    (True, False, False)
    """
    return type(found) is int and found == VERSIONS[kind]


def check_version(kind: str, found: object, path: Path | str) -> None:
    """Accept the version ``found`` in the file ``path``, which is any value that JSON can hold.

    Raises:
        FormatError: if it is not the version that is read.
    """
    if is_current(kind, found):
        return
    shown = json.dumps(found)
    if len(shown) > _LONGEST_SHOWN:
        shown = f"{shown[:_LONGEST_SHOWN]}..."
    raise FormatError(
        "{path} has {kind} format {shown}, and MM-Rec {version} reads {known}; {still_works}",
        path=path,
        kind=kind,
        shown=shown,
        version=mm_rec.__version__,
        known=VERSIONS[kind],
        still_works=_STILL_WORKS[kind],
    )


def take_version(kind: str, values: Mapping[str, Any], path: Path | str) -> dict[str, Any]:
    """``values`` of the file ``path`` without their version, which is checked; none counts as the first.

    Raises:
        FormatError: if it is not the version that is read.
    """
    rest = dict(values)
    check_version(kind, rest.pop(KEY, FIRST_VERSION), path)
    return rest
