"""Conversations to learn from: files in the usual formats, read by what is in them, and the tokens made of them.

| format            | a row                                                                              |
|-------------------|------------------------------------------------------------------------------------|
| Alpaca            | ``{"instruction": ..., "input": ..., "output": ...}``, also with ``system``, ``history`` |
| Dolly             | ``{"instruction": ..., "context": ..., "response": ...}``, the same                |
| prompt/completion | ``{"prompt": ..., "completion": ...}``, the same; both strings or lists of messages |
| ShareGPT          | ``{"conversations": [{"from": "human", "value": ...}, ...]}``, also with ``system``  |
| OpenAI messages   | ``{"messages": [{"role": "user", "content": ...}, ...]}``, or the list alone         |

The first three are one format, in which a question is called ``instruction``, ``prompt`` or ``question``, its details
``input`` or ``context``, and the answer ``output``, ``completion``, ``response`` or ``answer``. What a message is,
``mm_rec/text/message.py`` says. A field that is null counts as one that isn't there, and an empty one gives way to
one that holds something, so a table may hold rows of several formats side by side.

Files are JSONL (plain or compressed), Parquet, or JSON with a list of rows. Formats may be mixed.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mm_rec.data.files import SUFFIXES, BadRows, Row, find_files, read_rows
from mm_rec.data.manifest import MANIFEST
from mm_rec.data.pack import Document
from mm_rec.errors import UserError
from mm_rec.regular_file import read_regular
from mm_rec.text.conversation import encode_conversation
from mm_rec.text.message import Message, first_filled, is_empty, read_message, without_nulls
from mm_rec.text.tokenizer import Tokenizer
from mm_rec.translation import Translatable

__all__ = ["encode_document", "find_conversations", "parse_conversation", "read_conversations"]

MAX_LIST_BYTES = 512_000_000
"""A list in one JSON file is read whole, and takes several times as much memory as the file."""

_TURNS = ("messages", "conversations")
_QUESTIONS = ("instruction", "prompt", "question")
_DETAILS = ("input", "context")
_ANSWERS = ("output", "completion", "response", "answer")
_FORMATS = "messages, conversations, instruction and output or response, or prompt and completion"


def find_conversations(path: Path) -> list[Path]:
    """The data files at ``path``: itself, or those in the folder and its subfolders, in the order of their names.

    Raises UserError if there is none.
    """
    if path.is_dir():
        lists = [
            file
            for file in path.rglob("*.json")
            if file.is_file() and not any(p[0] == "." for p in file.relative_to(path).parts)
        ]
        files = sorted([*find_files(path), *lists])
    else:
        files = [path] if path.name.lower().endswith(".json") and path.is_file() else find_files(path)
    files = [file for file in files if file.name != MANIFEST]
    if not files:
        kinds = ", ".join([".json", *SUFFIXES])
        raise UserError("there are no conversations in {path}; they are read from {kinds}", path=path, kinds=kinds)
    return files


def read_conversations(path: Path, bad: BadRows) -> Iterator[list[Message]]:
    """The conversations of one file; rows that are none go to ``bad`` with file and line."""
    for row in _read_json(path, bad) if path.name.lower().endswith(".json") else read_rows(path, bad):
        try:
            yield parse_conversation(row.value)
        except ValueError as error:
            bad.report(row.path, row.line, Translatable("{problem}", problem=error))


def parse_conversation(value: Any) -> list[Message]:
    """The messages of one row in any of the formats.

    Raises:
        ValueError: saying what is wrong with the row.
    """
    if isinstance(value, list):
        messages = _messages(value)
    elif isinstance(value, dict):
        messages = _row(without_nulls(value))
    else:
        raise ValueError(Translatable("a conversation is an object or a list of messages"))
    answers = [message.content for message in messages if message.role == "assistant"]
    if not answers:
        raise ValueError(Translatable("there is no answer of an assistant to learn from"))
    if not all(answer.strip() for answer in answers):
        raise ValueError(Translatable("an answer of the assistant is empty"))
    return messages


def encode_document(tokenizer: Tokenizer, messages: list[Message]) -> Document:
    """A conversation as a document of a token store: the loss counts what the assistant says, end tokens included.

    Its ``n_bytes`` are those of the answers, so that bits per byte are those of what is counted.
    """
    ids, mask = encode_conversation(tokenizer, messages)
    n_bytes = sum(len(message.content.encode()) for message in messages if message.role == "assistant")
    return Document(ids, n_bytes, mask)


def _row(fields: dict[str, Any]) -> list[Message]:
    turns, question, answer = (first_filled(fields, names) for names in (_TURNS, _QUESTIONS, _ANSWERS))
    pair = question is not None and answer is not None
    if turns is not None and not (pair and is_empty(fields[turns])):
        before = _system(fields)
        return [*before, *_messages(fields[turns])]
    if question is None or answer is None:
        raise ValueError(Translatable("the object is no conversation: it has neither {formats}", formats=_FORMATS))
    before = [*_system(fields), *_history(fields)]
    return [*before, *_question(fields, question), *_turn(fields[answer], "assistant", answer)]


def _messages(value: Any) -> list[Message]:
    if not isinstance(value, list):
        raise ValueError(Translatable("the messages are not a list"))
    return [_message(one) for one in value]


def _message(value: Any) -> Message:
    """Returns a message in OpenAI's form (role, content) or ShareGPT's (from, value)."""
    if isinstance(value, dict):
        fields = without_nulls(value)
        names = {"role": first_filled(fields, ("role", "from")), "content": first_filled(fields, ("content", "value"))}
        value = {**fields, **{field: fields[name] for field, name in names.items() if name is not None}}
    message = read_message(value)
    return Message(message.role, _text(message.content, "content of a message"))


def _history(fields: dict[str, Any]) -> list[Message]:
    history = fields.get("history") or []
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise ValueError(Translatable("history is not a list of pairs of a question and an answer"))
    roles = ("user", "assistant")
    return [
        one for turn in history for role, text in zip(roles, turn, strict=True) for one in _turn(text, role, "history")
    ]


def _question(fields: dict[str, Any], name: str) -> list[Message]:
    if isinstance(fields[name], list):
        return _messages(fields[name])
    question = _text(fields[name], name)
    detail = first_filled(fields, _DETAILS)
    details = "" if detail is None or is_empty(fields[detail]) else _text(fields[detail], detail)
    return [Message("user", f"{question}\n\n{details}" if question and details else question + details)]


def _system(value: dict[str, Any]) -> list[Message]:
    return [] if is_empty(value.get("system", "")) else [Message("system", _text(value["system"], "system"))]


def _turn(value: Any, role: str, name: str) -> list[Message]:
    return _messages(value) if isinstance(value, list) else [Message(role, _text(value, name))]


def _text(value: Any, name: str) -> str:
    """``value`` if it is text that a file could hold."""
    if not isinstance(value, str):
        raise ValueError(Translatable("the {name} is not a string", name=name))
    if "\0" in value:
        raise ValueError(Translatable("the {name} has a NUL character", name=name))
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(Translatable("the {name} has a lone surrogate, half of a character", name=name)) from None
    return value


def _read_json(path: Path, bad: BadRows) -> Iterator[Row]:
    """The values in the list of a JSON file; a file that does not begin with a list is read as JSONL."""
    try:
        if path.stat().st_size > MAX_LIST_BYTES:
            raise UserError(
                "{path} has more than {megabytes} MB and would be read into memory whole; write "
                "it as .jsonl, a row a line",
                path=path,
                megabytes=MAX_LIST_BYTES // 1_000_000,
            )
        content = read_regular(path).removeprefix(codecs.BOM_UTF8).decode()
    except OSError as error:
        raise UserError("cannot read {path}: {reason}", path=path, reason=error.strerror or error) from error
    except UnicodeDecodeError as error:
        bad.report(
            path,
            error.object.count(b"\n", 0, error.start) + 1,
            Translatable("not UTF-8: {reason}", reason=error.reason),
        )
        return
    at = _after_space(content, 0)
    if not content.startswith("[", at):
        yield from read_rows(path, bad)
        return
    decoder = json.JSONDecoder()
    line, counted, at = 1, 0, _after_space(content, at + 1)
    while not content.startswith("]", at):
        line, counted = line + content.count("\n", counted, at), at
        try:
            value, at = decoder.raw_decode(content, at)
        except json.JSONDecodeError as error:
            bad.report(
                path, error.lineno, Translatable("not valid JSON: {msg}; what follows is left out", msg=error.msg)
            )
            return
        except RecursionError:
            bad.report(path, line, Translatable("the JSON value is nested too deeply; what follows is left out"))
            return
        except ValueError:  # Python converts no numbers of thousands of digits
            bad.report(path, line, Translatable("a number has too many digits; what follows is left out"))
            return
        yield Row(path, line, value)
        at = _after_space(content, at)
        if content.startswith(",", at):
            at = _after_space(content, at + 1)
        elif not content.startswith("]", at):
            line += content.count("\n", counted, at)
            bad.report(path, line, Translatable("the list breaks off or lacks a comma; what follows is left out"))
            return


def _after_space(content: str, at: int) -> int:
    """The index of the first character from ``at`` on that is not white space."""
    while content[at : at + 1].isspace():
        at += 1
    return at
