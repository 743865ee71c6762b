"""Parses documents in a worker process with limits, and keeps their text in a file while it is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import psutil

import mm_rec
from mm_rec.data.documents.kinds import Kind, LeftOutError
from mm_rec.data.documents.worker import MEMORY_BYTES
from mm_rec.data.files import MAX_ROW_BYTES
from mm_rec.storage.files import format_bytes
from mm_rec.translation import Translatable

__all__ = ["Parser"]

SECONDS, SECONDS_A_MEGABYTE = 60.0, 6.0
"""What a file may take."""

MOST_TEXT = MAX_ROW_BYTES
"""Bytes of text that one file may hold."""

LONGEST_ANSWER = 3 * MOST_TEXT
WATCH_SECONDS = 0.1


class Parser:
    """Reads files that need parsing. The text of each is kept on the disk, and reading it again costs nothing.

    Args:
        folder: where to keep the text; None for the system's folder of temporary files.
        encoding: what the user says of text files; None to find out.
        columns: of tables, those that hold the text; none takes the usual names.
    """

    def __init__(self, folder: Path | None = None, encoding: str | None = None, columns: Sequence[str] = ()) -> None:
        self._settings = {"encoding": encoding, "columns": list(columns)}
        self._kept: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by __exit__
        self._places: dict[Path, tuple[int, int]] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._grown = False

    def __enter__(self) -> Parser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_process()
        self._kept.close()

    def texts(self, path: Path, kind: Kind) -> Iterator[str]:
        """Yields the documents of a file, in this call or an earlier one parsed to its end before the first is given.

        Raises:
            LeftOutError: if the file is not used.
        """
        if path not in self._places:
            start = self._kept.seek(0, os.SEEK_END)
            try:
                count = self._parse(path, kind)
            except LeftOutError:
                self._kept.truncate(start)
                raise
            self._places[path] = (start, count)
        place, count = self._places[path]
        for _ in range(count):
            self._kept.seek(place)  # what is read meanwhile may have moved it
            line = self._kept.readline()
            place += len(line)
            yield json.loads(line)

    def _parse(self, path: Path, kind: Kind) -> int:
        """Keep the documents of a file; returns how many there are."""
        count = size = 0
        pieces: list[str] = []
        for answer in self._answers(path, kind):
            text = answer["text"]
            size += len(text.encode("utf-8", "surrogatepass"))
            if size > MOST_TEXT:
                self._end_process()
                raise LeftOutError("holds more than {most} of text", most=format_bytes(MOST_TEXT))
            pieces.append(text)
            if answer["more"]:
                continue
            whole = "".join(pieces)
            pieces.clear()
            if problem := _problem(whole):
                self._end_process()
                raise LeftOutError(problem)
            if whole.strip():
                self._kept.write(json.dumps(whole).encode() + b"\n")
                count += 1
        if not count:
            raise LeftOutError("no text in it; scanned pages are pictures" if kind.name == "PDF" else "no text in it")
        return count

    def _answers(self, path: Path, kind: Kind) -> Iterator[dict[str, Any]]:
        try:
            seconds = SECONDS + SECONDS_A_MEGABYTE * path.stat().st_size / 1e6
        except OSError as error:
            raise LeftOutError("cannot be opened ({reason})", reason=(error.strerror or str(error)).lower()) from None
        request = {"path": str(path.absolute()), "kind": kind.name, "seconds": seconds, **self._settings}
        process = self._start_process()
        assert process.stdin is not None
        assert process.stdout is not None
        start = time.monotonic()
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            while line := process.stdout.readline(LONGEST_ANSWER):
                answer = json.loads(line.decode("utf-8", "surrogatepass"))
                if "left_out" in answer:
                    raise LeftOutError(answer["left_out"])
                if "done" in answer:
                    return
                yield answer
        except (BrokenPipeError, ValueError):
            pass  # it has ended in the midst
        self._end_process()
        if self._grown:
            raise LeftOutError("needs too much memory")
        if time.monotonic() - start >= seconds:
            raise LeftOutError("takes longer than {seconds:.0f} s", seconds=seconds)
        raise LeftOutError("damaged: its reader broke down")

    def _start_process(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        places = [str(Path(mm_rec.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._grown = False
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "mm_rec.data.documents.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(places)},
            start_new_session=True,  # Ctrl-C is for the program, which ends this process in its own way
        )
        threading.Thread(target=self._watch, args=(self._process,), daemon=True).start()
        return self._process

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        """End a process that grows where the system sets no limit."""
        try:
            watched = psutil.Process(process.pid)
            while process.poll() is None:
                if watched.memory_info().rss > MEMORY_BYTES:
                    self._grown = True
                    process.kill()
                time.sleep(WATCH_SECONDS)
        except psutil.Error:  # it has ended
            pass

    def _end_process(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def _problem(text: str) -> str | None:
    if "\0" in text:
        return Translatable("zero bytes in its text")
    try:
        text.encode()
    except UnicodeEncodeError:
        return Translatable("halves of characters in its text")
    return None
