"""Data that is on this machine already: what Python brings, and the user's own files."""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from mm_rec import system
from mm_rec.data.documents.account import count_kinds, names_of, table
from mm_rec.data.documents.folder import find_documents
from mm_rec.data.documents.kinds import readable_endings
from mm_rec.data.documents.parsing import Parser
from mm_rec.data.documents.reading import Documents, ReadOptions
from mm_rec.data.download.builtin import builtin_code, builtin_text
from mm_rec.data.download.sources import BUILTIN
from mm_rec.data.manifest import check_files, read_manifest, record_file
from mm_rec.data.pack import file_sha256
from mm_rec.errors import UserError
from mm_rec.storage.files import format_bytes, reporting_errors
from mm_rec.translation import Translatable

__all__ = ["take_builtin", "take_own"]


def take_builtin(kind: str, samples: int | None, data_dir: Path, tell: Callable[[str], None]) -> Path:
    """Write the builtin text or code as ``data_dir/KIND/builtin.jsonl``, unless it is there; returns the file.

    What was written once stays as it is when packages come and go, so that a run on it can go on.

    Args:
        kind: ``text`` or ``code``.
        samples: how many documents; None takes all there are, some ten megabytes.
        data_dir: the data folder.
        tell: takes a line about what happens.
    """
    name = f"{kind}/{BUILTIN}.jsonl"
    entry = read_manifest(data_dir).get(name)
    if entry is not None and entry.get("asked") == samples and (data_dir / name).exists():
        check_files(data_dir, [data_dir / name])
        tell(Translatable("{name}: {path} is there already", name=BUILTIN, path=data_dir / name))
        return data_dir / name
    tell(Translatable("{name}: reading {kind} from this machine's Python installation", name=BUILTIN, kind=kind))
    texts = builtin_code() if kind == "code" else builtin_text()
    entry = {"source": BUILTIN, "revision": sys.version, "licence": "as each package", "asked": samples}
    return _write(data_dir, name, islice(texts, samples), entry, tell)


def take_own(
    kind: str,
    path: Path,
    options: ReadOptions,
    data_dir: Path,
    tell: Callable[[str], None],
    *,
    name_left_out: bool = False,
) -> Path:
    """Copy the documents of the user's file or folder ``path`` to ``data_dir/KIND/own.jsonl``; returns the file.

    Of text as it stands, code takes programs alone. What is read and what is left out is told.

    Raises:
        UserError: if there is nothing to read, for a bad row too many, or if ``path`` is in that folder already.
    """
    own, given = data_dir / kind, path.resolve()
    if own.exists() and any(one.exists() and one.samefile(own) for one in (given, *given.parents)):
        raise UserError(
            "{path} is in the data folder already and is used as it is; leave out --{kind}_dir", path=path, kind=kind
        )
    found = find_documents(path, programs_only=kind == "code", skip=[data_dir])
    with Parser(encoding=options.encoding, columns=options.columns) as parser:
        documents = Documents(found.paths, parser, options)
        texts = (document.text for document in documents.read())
        entry = {"source": "own", "origin": {"path": str(path)}}
        target = _write(data_dir, f"{kind}/own.jsonl", texts, entry, tell) if found.files else None
    left_out = [*found.left_out, *documents.left_out.values()]
    lines = table(str(path), count_kinds(documents), left_out, [])
    for line in [*lines, *(names_of(left_out) if name_left_out else ())]:
        tell(line)
    if target is None or not documents.counts:
        raise UserError(
            "there is no document in {path}; what is read are {endings}",
            path=path,
            endings=readable_endings(),
        )
    if documents.bad_rows:
        tell(
            Translatable(
                "{count} bad rows left out, the first one {first}",
                count=len(documents.bad_rows),
                first=documents.bad_rows[0],
            )
        )
    return target


def _write(data_dir: Path, name: str, texts: Iterable[str], entry: dict[str, Any], tell: Callable[[str], None]) -> Path:
    target = data_dir / name
    part = target.with_name(f".{target.name}.part")
    count = 0
    if target.exists() and name not in read_manifest(data_dir):
        raise UserError("{target} is in the way: this command has not made it; give it another name", target=target)
    with reporting_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.unlink(missing_ok=True)
            with part.open("xb") as file:
                for text in texts:
                    file.write(json.dumps(text, ensure_ascii=False).encode() + b"\n")
                    count += 1
                file.flush()
                system.sync_descriptor(file.fileno())
            system.replace(part, target)
            system.sync(target.parent)
        finally:
            part.unlink(missing_ok=True)
    size = target.stat().st_size
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    record_file(data_dir, name, {**entry, "samples": count, "bytes": size, "sha256": file_sha256(target), "date": date})
    tell(
        Translatable(
            "{name}: {count:,} samples, {size}, in {target}",
            name=entry["source"],
            count=count,
            size=format_bytes(size),
            target=target,
        )
    )
    return target
