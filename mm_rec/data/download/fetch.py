"""Downloading samples of one source into one JSONL file, through every kind of interruption.

Lines go to ``.NAME.part``. Every few hundred rows it is flushed to the disk, and ``.NAME.journal`` takes down how long
it is and where in the source reading stands. After a kill at any instant the same command cuts the part file to what
the journal says and reads on from there. The file gets its name when it is complete; then its SHA-256 goes into the
manifest.
"""

from __future__ import annotations

import copy
import datetime
import json
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from mm_rec import system
from mm_rec.data.download.hub import Rows, UnreachableError, explain, find_revision, quiet, retry_delay
from mm_rec.data.download.sources import Source
from mm_rec.data.download.trees import COLUMNS, TREE, best_conversation
from mm_rec.data.filters import count_reasons, quality_problem
from mm_rec.data.manifest import check_files, read_manifest, record_file
from mm_rec.data.pack import file_sha256
from mm_rec.errors import UserError
from mm_rec.regular_file import read_regular
from mm_rec.storage.files import remove_leftovers, reporting_errors, write_atomic
from mm_rec.storage.hub.client import first_line
from mm_rec.text.message import without_nulls
from mm_rec.translation import Translatable

__all__ = ["fetch"]

_CHUNK = 500  # rows between two entries of the journal
_ATTEMPTS = 6  # without progress in between
_TELL_SECONDS = 5.0
_HEADING = re.compile(r"\s*=.*=\s*")


@dataclass
class _Journal:
    """How far a download has come.

    Attributes:
        origin: what is read; a journal of another origin is of no use.
        revision: the commit that is read.
        asked: samples that are wanted.
        state: where in the source reading stands; None at its start.
        n_bytes: length of the part file.
        kept: samples in it.
        read: rows that were read for them.
        dropped: rows that were left out, by reason.
        done: whether the part file is complete.
        tree: the messages that were read of a conversation whose rows may go on.
    """

    origin: dict[str, Any]
    revision: str
    asked: int
    state: dict[str, Any] | None = None
    n_bytes: int = 0
    kept: int = 0
    read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    done: bool = False
    tree: list[dict[str, Any]] = field(default_factory=list)


def fetch(source: Source, samples: int, data_dir: Path, tell: Callable[[str], None]) -> Path:
    """Download the first ``samples`` samples of ``source`` that pass the quality filter; returns the file.

    Goes on where an earlier call for the same source was stopped; does nothing if one was completed. The caller sees
    to it that nobody else writes into ``data_dir``.

    Args:
        source: the row of the table.
        samples: how many, if the source has as many.
        data_dir: the file is ``data_dir / source.path``.
        tell: takes a line about what happens.

    Raises:
        UnreachableError: if the hub cannot be reached.
        UserError: if it refuses, keeps failing or sends what can't be read; or if a file of that name is in the way.
    """
    download = _Download(source, samples, data_dir, tell)
    with reporting_errors(download.target):
        for folder in (data_dir, download.target.parent):
            remove_leftovers(folder)
        if download.is_complete():
            tell(Translatable("{name}: {target} is there already", name=source.name, target=download.target))
            return download.target
        download.target.parent.mkdir(parents=True, exist_ok=True)
        with quiet():
            download.read()
        entry = download.finish()
    line = Translatable(
        "{name}: {samples:,} samples in {target}", name=source.name, samples=entry["samples"], target=download.target
    )
    if entry["dropped"]:
        line = Translatable("{line}; left out: {dropped}", line=line, dropped=count_reasons(entry["dropped"]))
    tell(line)
    return download.target


class _Download:
    def __init__(self, source: Source, samples: int, data_dir: Path, tell: Callable[[str], None]) -> None:
        self.source = source
        self.samples = samples
        self.data_dir = data_dir
        self.tell = tell
        self.target = data_dir / source.path
        self.part = self.target.with_name(f".{self.target.name}.part")
        self.journal_path = self.target.with_name(f".{self.target.name}.journal")
        names = ("hub_id", "config", "split", "field", "data_dir", "data_files")
        self.origin = {name: getattr(source, name) for name in names}
        if source.trees:
            self.origin["language"] = source.row_language
        self.journal = self._load()
        self.reached = False

    def is_complete(self) -> bool:
        """Whether an earlier call downloaded what is asked for; raises UserError if another file is in its place."""
        if self.journal is not None and self.journal.done:  # stopped just before the end
            self.finish()
        if not self.target.exists():
            return False
        entry = read_manifest(self.data_dir).get(self.source.path)
        if entry is None:
            raise UserError(
                "{target} is in the way: it is not from a download; move it or use another folder", target=self.target
            )
        check_files(self.data_dir, [self.target])
        enough = entry.get("asked") == self.samples or entry["samples"] < min(self.samples, entry["asked"])
        return bool(entry.get("origin") == self.origin and enough)

    def read(self) -> None:
        """Complete the part file, through passing errors."""
        attempt = 0
        while self.journal is None or not self.journal.done:
            before = self.journal
            try:
                self._read_on()
            except UserError:
                raise
            except Exception as error:
                attempt = 0 if self.journal is not before else attempt
                explained, delay = explain(self.source, error), retry_delay(error, attempt)
                if explained is None:
                    raise
                attempt += 1
                # A hub that was never reached is most likely out of reach, and somebody waits for an answer.
                absent = not self.reached and isinstance(explained, UnreachableError) and explained.status is None
                if delay is None or attempt == _ATTEMPTS or absent:
                    raise explained from error
                self.tell(
                    Translatable(
                        "{name}: {error}; trying again in {delay:.0f} s",
                        name=self.source.name,
                        error=first_line(error),
                        delay=delay,
                    )
                )
                time.sleep(delay)

    def finish(self) -> dict[str, Any]:
        """Give the part file its name and record it; returns its entry in the manifest."""
        assert self.journal is not None
        if self.part.exists():
            system.replace(self.part, self.target)
            system.sync(self.target.parent)
        entry = {
            "source": self.source.name,
            "origin": self.journal.origin,
            "revision": self.journal.revision,
            "licence": self.source.licence,
            "asked": self.journal.asked,
            "samples": self.journal.kept,
            "rows": self.journal.read,
            "dropped": dict(self.journal.dropped.most_common()),
            "bytes": self.target.stat().st_size,
            "sha256": file_sha256(self.target),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        record_file(self.data_dir, self.source.path, entry)
        self.journal_path.unlink()
        self.journal = None
        return entry

    def _load(self) -> _Journal | None:
        """The journal of a stopped download, if it fits the files."""
        try:
            journal = _Journal(**json.loads(read_regular(self.journal_path)))
            journal.dropped = Counter(journal.dropped)
            if journal.done and not self.part.exists():
                return journal if self.target.stat().st_size == journal.n_bytes else None
            return journal if self.part.is_file() and self.part.stat().st_size >= journal.n_bytes else None
        except (OSError, ValueError, TypeError):
            return None

    def _read_on(self) -> None:
        """Read from where the journal stands to the end of what is asked for."""
        revision = find_revision(self.source)
        self.reached = True
        if self.journal is None or self.journal.origin != self.origin or self.journal.kept >= self.samples:
            self._commit(_Journal(self.origin, revision, self.samples))
            self.part.unlink(missing_ok=True)
            self.part.touch()
        assert self.journal is not None
        journal = copy.deepcopy(self.journal)
        journal.asked = self.samples
        rows = Rows(self.source, journal.revision, journal.state)
        told = time.monotonic()
        with self.part.open("r+b") as file:
            file.truncate(journal.n_bytes)
            file.seek(journal.n_bytes)
            for row in rows:
                journal.read += 1
                sample = self._gather(row, journal) if self.source.trees else row
                if sample is not None:
                    self._write(sample, journal, file)
                journal.done = journal.kept == self.samples
                if journal.done or journal.read % _CHUNK == 0:
                    journal.state = rows.state
                    self._commit(journal, file)
                if journal.done:
                    return
                if time.monotonic() > told + _TELL_SECONDS:
                    told = time.monotonic()
                    self.tell(
                        Translatable(
                            "{name}: {kept:,} of {samples:,} samples",
                            name=self.source.name,
                            kept=journal.kept,
                            samples=self.samples,
                        )
                    )
            if conversation := best_conversation(journal.tree):
                self._write({"messages": conversation}, journal, file)
            journal.done = True
            self._commit(journal, file)

    def _commit(self, journal: _Journal, file: IO[bytes] | None = None) -> None:
        """Make ``journal`` and what it counts safe on the disk."""
        if file is not None:
            file.flush()
            system.sync_descriptor(file.fileno())
        write_atomic(self.journal_path, json.dumps(vars(journal)).encode())
        self.journal = copy.deepcopy(journal)

    def _write(self, sample: dict[str, Any], journal: _Journal, file: IO[bytes]) -> None:
        """Write a sample, or count why it is left out."""
        line, problem = self._line(sample)
        if problem:
            journal.dropped[problem] += 1
            return
        file.write(line)
        journal.n_bytes += len(line)
        journal.kept += 1

    def _gather(self, row: dict[str, Any], journal: _Journal) -> dict[str, Any] | None:
        """Add a message to the tree under way; returns the conversation of the tree before, where one is complete."""
        conversation = []
        if journal.tree and journal.tree[0][TREE] != row[TREE]:
            conversation = best_conversation(journal.tree)
            journal.tree = []
        if row["lang"] == self.source.row_language:
            journal.tree.append({name: row[name] for name in COLUMNS})
        else:
            journal.dropped[Translatable("of another language")] += 1
        return {"messages": conversation} if conversation else None

    def _line(self, row: dict[str, Any]) -> tuple[bytes, str | None]:
        """A row as a line of JSON, or why it is left out."""
        if self.source.field is None:
            value: Any = {name: _plain(column) for name, column in row.items()}
        else:
            value = row[self.source.field]
            problem = self._problem(value)
            if problem:
                return b"", problem
            value = value.strip() if self.source.kind == "text" else value
        return json.dumps(value, ensure_ascii=False).encode() + b"\n", None

    def _problem(self, text: Any) -> str | None:
        if not isinstance(text, str) or "\0" in text:
            return Translatable("no text")
        if self.source.kind == "text" and _HEADING.fullmatch(text):
            return Translatable("heading")
        return quality_problem(text, self.source.kind)


def _plain(value: Any) -> Any:
    """A column of a conversation as JSON: turns that are stored as a dict of lists become a list of dicts."""
    columns = without_nulls(value) if isinstance(value, dict) else {}
    if columns and all(isinstance(column, list) for column in columns.values()):
        return [dict(zip(columns, parts, strict=True)) for parts in zip(*columns.values(), strict=True)]
    return value if isinstance(value, str | int | float | bool | list | dict | None) else str(value)
