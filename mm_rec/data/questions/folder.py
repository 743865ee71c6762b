"""Questions made from a file or folder of one's own documents, kept beside the runs as files of conversations."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mm_rec.data.documents.folder import find_documents
from mm_rec.data.documents.parsing import Parser
from mm_rec.data.documents.reading import Documents, ReadOptions
from mm_rec.data.questions.entries import Entry
from mm_rec.data.questions.make import Questions, make_questions
from mm_rec.data.questions.programs import entries_of_program
from mm_rec.data.questions.texts import entries_of_text
from mm_rec.errors import UserError
from mm_rec.storage.files import reporting_errors, write_atomic

__all__ = ["HELD_OUT", "QuestionFiles", "entries_of_folder", "preview", "write_questions"]

HELD_OUT = "held_out.jsonl"
"""File of the pairs that are not trained on."""

_PREVIEWED = 4
_FEWEST = 20


class QuestionFiles(NamedTuple):
    """What was made of a folder, and the file of what is to be trained on."""

    questions: Questions
    train: Path


def entries_of_folder(path: Path, options: ReadOptions, skip: Iterable[Path] = ()) -> Iterator[Entry]:
    """Yields the entries of all documents at ``path`` that can be read.

    Raises:
        UserError: if there is nothing to read, or a bad row too many.
    """
    found = find_documents(path, skip=list(skip))
    with Parser(encoding=options.encoding, columns=options.columns) as parser:
        for document in Documents(found.paths, parser, options).read():
            if document.path.suffix in (".py", ".pyi"):
                yield from entries_of_program(document.text, document.path.stem)
            elif not document.is_program:
                yield from entries_of_text(document.text)


def write_questions(path: Path, task: str, folder: Path, options: ReadOptions, seed: int) -> QuestionFiles:
    """Makes questions from the documents at ``path``, and writes those to train on and those held out.

    Args:
        path: a file or folder of documents.
        task: ``chat`` for conversations of several turns besides; ``instruct`` for pairs alone.
        folder: where to write.
        options: how the documents are to be read.
        seed: of the wordings and the order.

    Raises:
        UserError: if there are too few.
    """
    questions = make_questions(entries_of_folder(path, options, skip=[folder]), seed=seed)
    if len(questions.train) < _FEWEST:
        raise UserError(
            f"{path} gives {len(questions.train)} questions and training needs {_FEWEST}: they are made from headings, "
            "definitions, questions with answers, and docstrings; name more documents, or conversations with --data"
        )
    rows = [pair.row() for pair in questions.train]
    if task == "chat":
        rows += [{"messages": talk} for talk in questions.conversations]
    with reporting_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        train = folder / f"{task}.jsonl"
        write_atomic(train, _lines(rows))
        write_atomic(folder / HELD_OUT, _lines([pair.row() for pair in questions.held_out]))
    return QuestionFiles(questions, train)


def preview(questions: Questions, tell: Callable[[str], None]) -> None:
    """Tells how many questions there are and shows some of them, of as many kinds as there are."""
    tell(questions.describe())
    firsts = {pair.kind: pair for pair in reversed(questions.train)}
    shown = list(dict.fromkeys([*firsts.values(), *questions.train]))
    for pair in shown[:_PREVIEWED]:
        tell(f"\n  question: {pair.question.replace(chr(10), chr(10) + '    ')}\n  answer: {pair.answer}")


def _lines(rows: Iterable[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
