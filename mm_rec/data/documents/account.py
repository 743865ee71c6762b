"""The account of what was read: a table by kind of file, and the names of what was left out."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mm_rec.data.documents.folder import Found, LeftOut
from mm_rec.data.documents.kinds import KINDS
from mm_rec.data.documents.reading import Documents
from mm_rec.errors import install_command
from mm_rec.regular_file import read_regular
from mm_rec.translation import Translatable, translate, translate_record

__all__ = [
    "Account",
    "count_kinds",
    "names_of",
    "read_account",
    "relative",
    "table",
    "table_of",
    "tell_account",
    "write_account",
]

_NEEDS_EXTRA = "needs the extra "
_MOST_REASONS = 4
_COLUMNS = (
    Translatable("kind"),
    Translatable("files"),
    Translatable("read"),
    Translatable("documents"),
    Translatable("left out"),
)
_SILENT_KINDS = frozenset(kind.name for kind in KINDS if kind.how == "rows")

Kinds = Mapping[str, Mapping[str, int]]
"""By kind, how many files were ``read`` and how many ``documents`` they gave."""


_FILE = "account.json"


class Account(NamedTuple):
    """What was read of a domain's files by kind, the files that were left out, and what filters left out of others."""

    kinds: Kinds
    files: list[LeftOut]
    dropped: list[LeftOut]


def count_kinds(documents: Documents) -> dict[str, dict[str, int]]:
    """Returns what each kind of file gave."""
    return {
        kind: {"read": count, "documents": documents.counts[kind]} for kind, count in documents.n_read.items() if count
    }


def table_of(title: str, found: Found, documents: Documents) -> list[str]:
    """Returns the :func:`table` of files that were found and then read, of which no filter left anything out."""
    return table(title, count_kinds(documents), [*found.left_out, *documents.left_out.values()], [])


def table(title: str, kinds: Kinds, files: Sequence[LeftOut], documents: Sequence[LeftOut]) -> list[str]:
    r"""Returns the table as lines: by kind of file how many were read, and how many were left out and why.

    It is empty for plain data files of which nothing is left out, as downloads are.

    Args:
        title: stands above it.
        kinds: what was read.
        files: the files that were left out.
        documents: what filters have left out of the files that were read.

    >>> from pathlib import Path
    >>> left_out = [LeftOut(Path("b.pdf"), "PDF", "encrypted"), LeftOut(Path("x.png"), ".png", "no text in pictures")]
    >>> print("\n".join(table("mine", {"PDF": {"read": 2, "documents": 2}}, left_out, [])))
    mine: 4 files, 2 read and 2 left out
      kind  files  read  documents  left out
      PDF       3     2          2  1 encrypted
      .png      1     0          0  1 no text in pictures
    """
    why: dict[str, Counter[str]] = defaultdict(Counter)
    for one in files:
        why[one.kind][one.why] += one.n_documents
    dropped: dict[str, Counter[str]] = defaultdict(Counter)
    for one in documents:
        dropped[one.kind][one.why] += one.n_documents
    if not files and not set(kinds) - _SILENT_KINDS:
        return []
    names = sorted({*kinds, *why}, key=lambda kind: (-kinds.get(kind, {}).get("read", 0), kind))
    rows = [tuple(map(translate, _COLUMNS))]
    for name in names:
        entry = kinds.get(name, {"read": 0, "documents": 0})
        count = entry["read"] + why[name].total()
        filtered = [translate("{reason} (a filter)", reason=one) for one in _reasons(dropped[name])]
        reasons = "; ".join([*_reasons(why[name]), *filtered])
        rows.append((translate(name), f"{count:,}", f"{entry['read']:,}", f"{entry['documents']:,}", reasons))
    n_read, n_left_out = sum(one["read"] for one in kinds.values()), len(files)
    head = translate(
        "{title}: {files:,} files, {read:,} read and {left_out:,} left out",
        title=title,
        files=n_read + n_left_out,
        read=n_read,
        left_out=n_left_out,
    )
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        "  ".join(["", row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in (1, 2, 3)), row[4]]).rstrip()
        for row in rows
    ]
    return [head, *lines, *_remedies(files)]


def names_of(left_out: Iterable[LeftOut]) -> list[str]:
    """Returns a line for each file that is left out, and for each of which a filter leaves documents out."""
    lines = []
    for one in left_out:
        why = translate_record(one.why)
        if one.n_documents > 1:
            why = translate("{count:,} documents: {reason}", count=one.n_documents, reason=why)
        lines.append(translate("  left out: {path}: {reason}", path=one.path, reason=why))
    return lines


def relative(left_out: Iterable[LeftOut], home: Path) -> list[LeftOut]:
    """Returns the same with paths as seen from the folder ``home``."""
    return [one._replace(path=one.path.relative_to(home)) for one in left_out]


def _reasons(counts: Counter[str]) -> list[str]:
    common = counts.most_common(_MOST_REASONS)
    rest = counts.total() - sum(count for _, count in common)
    reasons = [f"{count:,} {translate_record(why)}" for why, count in common]
    return reasons + ([translate("{count:,} for other reasons", count=rest)] if rest else [])


def _remedies(files: Iterable[LeftOut]) -> list[str]:
    extras = sorted({one.why.removeprefix(_NEEDS_EXTRA) for one in files if one.why.startswith(_NEEDS_EXTRA)})
    return [
        translate("  to read what needs the extra {extra}: {command}", extra=extra, command=install_command(extra))
        for extra in extras
    ]


def tell_account(name: str, account: Account, with_names: bool, tell: Callable[[str], None]) -> None:
    """Tell what was read of a domain and what was left out; with the names of that, or how to see them."""
    lines = table(name, account.kinds, account.files, account.dropped)
    if with_names:
        lines += names_of([*account.files, *account.dropped])
    elif account.files or (lines and account.dropped):
        lines.append(translate("  --list names what is left out"))
    for line in lines:
        tell(line)


def write_account(folder: Path, accounts: Mapping[str, Account]) -> None:
    """Write the accounts of all domains into ``folder``, if there is more to tell than plain rows."""
    told = {
        name: {"kinds": one.kinds, "files": _plain(one.files), "dropped": _plain(one.dropped)}
        for name, one in accounts.items()
        if table(name, one.kinds, one.files, one.dropped)
    }
    if told:
        (folder / _FILE).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8", newline="\n")


def read_account(folder: Path) -> dict[str, Account]:
    """Returns what :func:`write_account` wrote; nothing where it wrote nothing."""
    if not (folder / _FILE).exists():
        return {}
    told = json.loads(read_regular(folder / _FILE))
    return {name: Account(one["kinds"], _parse(one["files"]), _parse(one["dropped"])) for name, one in told.items()}


def _plain(left_out: Iterable[LeftOut]) -> list[list[str | int]]:
    return [[one.path.as_posix(), one.kind, one.why, one.n_documents] for one in left_out]


def _parse(plain: Iterable[tuple[str, str, str, int]]) -> list[LeftOut]:
    return [LeftOut(Path(path), kind, why, count) for path, kind, why, count in plain]
