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
from mm_rec.data.download.builtin import builtin_code, builtin_entries, builtin_text
from mm_rec.data.download.sources import BUILTIN
from mm_rec.data.manifest import check_files, read_manifest, record_file
from mm_rec.data.pack import file_sha256
from mm_rec.data.questions.make import make_questions
from mm_rec.errors import UserError
from mm_rec.storage.files import format_bytes, reporting_errors
from mm_rec.translation import Translatable

__all__ = ["QUESTIONS", "take_builtin", "take_builtin_questions", "take_own"]

QUESTIONS = "questions"
"""Folder of the questions that are held out from training."""

MOST_PAIRS = 30_000


def take_builtin(kind: str, samples: int | None, data_dir: Path, tell: Callable[[str], None]) -> Path:
    """Write the builtin text or code as ``data_dir/KIND/builtin.jsonl``, unless it is there; returns the file.

    What was written once stays as it is when packages come and go, so that a run on it can go on.

    Args:
        kind: ``text`` or ``code``.
        samples: how many documents; None takes all there are, some ten megabytes.
        data_dir: the data folder.
        tell: takes a line about what happens.
    """
    if _is_there(kind, samples, data_dir, tell):
        return data_dir / _builtin_file(kind)
    tell(Translatable("{name}: reading {kind} from this machine's Python installation", name=BUILTIN, kind=kind))
    texts = builtin_code() if kind == "code" else builtin_text()
    return _write(data_dir, _builtin_file(kind), islice(texts, samples), _builtin_entry(samples), tell)


def take_builtin_questions(samples: int | None, data_dir: Path, tell: Callable[[str], None]) -> list[Path]:
    """Write questions with answers from what is installed, unless they are there; returns the files.

    ``data_dir/instruct/builtin.jsonl`` has pairs of a question and an answer, ``data_dir/chat/builtin.jsonl``
    conversations of several turns, and ``data_dir/questions/builtin.jsonl`` pairs about other things, by which a model
    can be tested.

    Args:
        samples: how many pairs at most; None for the usual number. A third as many are conversations.
        data_dir: the data folder.
        tell: takes a line about what happens.
    """
    kinds = ("instruct", "chat", QUESTIONS)
    if not all(_is_there(kind, samples, data_dir, tell) for kind in kinds):
        tell(Translatable("{name}: making questions from this machine's Python installation", name=BUILTIN))
        questions = make_questions(builtin_entries(), most=samples or MOST_PAIRS)
        tell(Translatable("{name}: {questions}", name=BUILTIN, questions=questions.describe()))
        rows: dict[str, list[dict[str, Any]]] = {
            "instruct": [pair.row() for pair in questions.train],
            "chat": [{"messages": talk} for talk in questions.conversations],
            QUESTIONS: [pair.row() for pair in questions.held_out],
        }
        for kind in kinds:
            _write(data_dir, _builtin_file(kind), rows[kind], _builtin_entry(samples), tell)
    return [data_dir / _builtin_file(kind) for kind in kinds]


def _is_there(kind: str, samples: int | None, data_dir: Path, tell: Callable[[str], None]) -> bool:
    """Whether the builtin data of a kind were written for as many samples; those that are damaged are refused."""
    path = data_dir / _builtin_file(kind)
    entry = read_manifest(data_dir).get(_builtin_file(kind))
    if entry is None or entry.get("asked") != samples or not path.exists():
        return False
    check_files(data_dir, [path])
    tell(Translatable("{name}: {path} is there already", name=BUILTIN, path=path))
    return True


def _builtin_file(kind: str) -> str:
    return f"{kind}/{BUILTIN}.jsonl"


def _builtin_entry(samples: int | None) -> dict[str, Any]:
    return {"source": BUILTIN, "revision": sys.version, "licence": "as each package", "asked": samples}


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


def _write(
    data_dir: Path,
    name: str,
    samples: Iterable[str | dict[str, Any]],
    entry: dict[str, Any],
    tell: Callable[[str], None],
) -> Path:
    """Write a file of JSON, a sample a line, and enter it in the manifest; returns the file."""
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
                for sample in samples:
                    file.write(json.dumps(sample, ensure_ascii=False).encode() + b"\n")
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
