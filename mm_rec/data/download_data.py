"""Download samples of text and code, or take what this machine has. Also the program behind `mm-rec data`.

A download that was stopped goes on where it was; what is there already is not downloaded again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mm_rec.config import DOMAINS
from mm_rec.data.documents.reading import ReadOptions, read_options
from mm_rec.data.download.fetch import fetch
from mm_rec.data.download.hub import UnreachableError
from mm_rec.data.download.local import take_builtin, take_builtin_questions, take_own
from mm_rec.data.download.sources import (
    BUILTIN,
    DEFAULT_SOURCES,
    DEFAULT_TEXT,
    ENGLISH,
    Source,
    describe_sources,
    find_source,
)
from mm_rec.errors import UserError
from mm_rec.options import with_default
from mm_rec.program import Parser, positive_int, run_program
from mm_rec.storage.files import reporting_errors
from mm_rec.storage.lock import Lock
from mm_rec.translation import Translatable, translate

__all__ = ["DEFAULT_SAMPLES", "Request", "add_arguments", "download", "main", "read_arguments", "run"]

DEFAULT_SAMPLES = {"text": 20_000, "code": 2_000, "instruct": 5_000, "chat": 5_000}
"""Of each source by its kind. A paragraph is a tenth of a Python file, so that text and code come out alike."""

EPILOG = """sources:
{sources}

examples:
  {prog} --output_dir ./data --text_samples 500 --code_samples 500
  {prog} --text_samples 1000 --no_code
  {prog} --source c4 --source codesearchnet
  {prog} --source builtin
  {prog} --language tr --source wikipedia --source fineweb-2 --source oasst2
  {prog} --text_dir ~/books --no_code

The hub is the one of HF_ENDPOINT, if that is set; gated sets need HF_TOKEN. Files come as one JSON string a line, e.g.
data/text/wikitext.jsonl and data/code/code.jsonl, with data/manifest.json beside them.

Documents of your own are text, Markdown, HTML, PDF, Word, OpenDocument, PowerPoint, EPUB, RTF, CSV, spreadsheets,
JSON, JSONL (plain, .gz, .zst, .xz), Parquet, notebooks and source code; PDF, RTF and spreadsheets need the extra
documents. They may also be put into data/text by hand, programs into data/code, and `mm-rec train --text_dir` trains on
a folder as it is. What is not read is counted by its kind."""


@dataclass(frozen=True)
class Request:
    """What to get.

    Attributes:
        samples: how many of each source, by its kind; :data:`DEFAULT_SAMPLES` for a kind that is missing.
        sources: names of sources; none takes the defaults for text and code.
        language: code of the language of the samples, for sources that have several.
        text, code: whether the defaults, or ``builtin``, are taken for text and for code.
        chat: whether ``builtin`` gives questions with answers, too.
        text_dir, code_dir: the user's own files, in place of the defaults.
        reading: how those files are to be read.
        name_left_out: tell the name of every one of them that is not read.
    """

    samples: dict[str, int]
    sources: tuple[str, ...] = ()
    language: str = ENGLISH
    text: bool = True
    code: bool = True
    chat: bool = True
    text_dir: Path | None = None
    code_dir: Path | None = None
    reading: ReadOptions = field(default_factory=ReadOptions)
    name_left_out: bool = False


def download(
    data_dir: Path,
    request: Request | None = None,
    *,
    on_unreachable: Literal["builtin", "error"] = "error",
    tell: Callable[[str], None] | None = None,
) -> list[Path]:
    """Get data into ``data_dir``; returns its files.

    Args:
        data_dir: made if missing. A second process that writes into it is refused.
        request: what to get; text and code of the default sources if None.
        on_unreachable: what to do if the hub cannot be reached: ``builtin`` takes the builtin source for text and
            code in its place and says so, ``error`` raises.
        tell: takes a line about each thing that happens.

    Raises:
        UserError: if something is missing, refused, broken, or in the way.
    """
    request = request or Request({})
    tell = tell or (lambda line: None)
    own = {kind: path for kind, path in (("text", request.text_dir), ("code", request.code_dir)) if path is not None}
    kinds = [kind for kind, wanted in (("text", request.text), ("code", request.code)) if wanted]
    # Who brings documents wants to train on these alone: the defaults are for those who bring none.
    defaults = DEFAULT_SOURCES if request.language == ENGLISH else (DEFAULT_TEXT, *DEFAULT_SOURCES[1:])
    names = request.sources or [name for name in defaults if not own and find_source(name).kind in kinds]
    sources = [find_source(name).in_language(request.language) for name in names if name != BUILTIN]
    if not names and not own:
        raise UserError("nothing to download: leave out --no_code or --no_wikitext, or name a --source")
    if BUILTIN in names and "text" in kinds and request.language != ENGLISH:
        raise UserError("{name} is in English; {hint}", name=BUILTIN, hint=Translatable("leave --language out"))
    with reporting_errors(data_dir):
        data_dir.mkdir(parents=True, exist_ok=True)
    lock = Lock(data_dir / ".lock")
    try:
        files = [
            take_own(kind, path, request.reading, data_dir, tell, name_left_out=request.name_left_out)
            for kind, path in own.items()
        ]
        if BUILTIN in names:
            files += [take_builtin(kind, request.samples.get(kind), data_dir, tell) for kind in kinds]
        if BUILTIN in names and request.chat:
            files += take_builtin_questions(request.samples.get("instruct"), data_dir, tell)
        for source in sources:
            files.append(_fetch(source, request, data_dir, on_unreachable, tell))
    finally:
        lock.release()
    return files


def _fetch(source: Source, request: Request, data_dir: Path, on_unreachable: str, tell: Callable[[str], None]) -> Path:
    samples = request.samples.get(source.kind, DEFAULT_SAMPLES[source.kind])
    try:
        return fetch(source, samples, data_dir, tell)
    except UnreachableError as error:
        if on_unreachable == "error" or source.kind not in DOMAINS or source.language not in ("", ENGLISH):
            raise  # what every machine has is in English
        tell(
            Translatable(
                "{what}: taking the builtin {kind} in place of {name}",
                what=error.what,
                kind=source.kind,
                name=source.name,
            )
        )
        return take_builtin(source.kind, request.samples.get(source.kind), data_dir, tell)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("--output_dir", type=Path, default=Path("data"), help="data folder (default ./data)")
    for kind, text in (
        ("text", Translatable("from each text source")),
        ("code", Translatable("from each code source")),
        ("chat", Translatable("from each instruct or chat source")),
    ):
        default = f"{DEFAULT_SAMPLES[kind]:,}"
        parser.add_argument(f"--{kind}_samples", type=positive_int, metavar="N", help=with_default(text, default))
    parser.add_argument("--no_code", action="store_true", help="no code")
    parser.add_argument("--no_wikitext", action="store_true", help="no text")
    parser.add_argument("--no_chat", action="store_true", help="no questions and answers of the source builtin")
    parser.add_argument(
        "--source", action="append", default=[], metavar="NAME", help="from the table; may be given often"
    )
    parser.add_argument(
        "--language",
        default=ENGLISH,
        metavar="CODE",
        help=with_default("language of the samples, such as tr; text then comes from wikipedia", ENGLISH),
    )
    parser.add_argument("--text_dir", type=Path, metavar="PATH", help="file or folder of your own for text")
    parser.add_argument("--code_dir", type=Path, metavar="PATH", help="file or folder of your own for code")
    parser.add_argument(
        "--skip_bad", type=positive_int, default=0, metavar="N", help="leave out up to N bad rows of them"
    )
    parser.add_argument("--encoding", metavar="NAME", help="encoding of their text, such as cp1254; else found out")
    parser.add_argument(
        "--columns", metavar="NAMES", help="columns of their tables and JSON that hold the text, such as title,body"
    )
    parser.add_argument("--list", action="store_true", help="name every file that is left out, and why")


def read_arguments(options: argparse.Namespace) -> Request:
    """The request that the flags of :func:`add_arguments` stand for."""
    counts = {"text": options.text_samples, "code": options.code_samples}
    counts |= {"instruct": options.chat_samples, "chat": options.chat_samples}
    return Request(
        samples={kind: count for kind, count in counts.items() if count is not None},
        sources=tuple(options.source),
        language=options.language,
        text=not options.no_wikitext,
        code=not options.no_code,
        chat=not options.no_chat,
        text_dir=options.text_dir,
        code_dir=options.code_dir,
        reading=read_options(options.encoding, options.columns, options.skip_bad),
        name_left_out=options.list,
    )


def run(options: argparse.Namespace) -> int:
    """Do what the flags of :func:`add_arguments` say; returns the exit code."""
    files = download(options.output_dir, read_arguments(options), tell=_say)
    if any(file.parent.name in DOMAINS for file in files):
        _say(
            Translatable(
                "to train on it: python3 -m mm_rec.scripts.train_cpu --stage stage1 --data_dir {output_dir}",
                output_dir=options.output_dir,
            )
        )
    return 0


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    """Parse the flags and download."""
    parser = Parser(prog=prog or "python3 -m mm_rec.data.download_data", description=__doc__)
    parser.epilog = Translatable(EPILOG, prog=parser.prog, sources=describe_sources())
    add_arguments(parser)
    return run(parser.parse_args(arguments))


def _say(line: str) -> None:
    sys.stdout.write(translate(line) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(run_program(main))
