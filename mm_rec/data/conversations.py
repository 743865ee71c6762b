"""Conversations to learn from: files in the usual formats, read by what is in them, and the tokens made of them.

| format            | a row                                                                              |
|-------------------|------------------------------------------------------------------------------------|
| Alpaca            | ``{"instruction": ..., "input": ..., "output": ...}``, also with ``system``, ``history`` |
| ShareGPT          | ``{"conversations": [{"from": "human", "value": ...}, ...]}``, also with ``system``  |
| OpenAI messages   | ``{"messages": [{"role": "user", "content": ...}, ...]}``, or the list alone         |
| prompt/completion | ``{"prompt": ..., "completion": ...}``, both strings or both lists of messages       |

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
from mm_rec.text.conversation import Message, encode_conversation
from mm_rec.text.tokenizer import Tokenizer

__all__ = ["encode_document", "find_conversations", "parse_conversation", "read_conversations"]

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
}
MAX_LIST_BYTES = 512_000_000
"""A list in one JSON file is read whole, and takes several times as much memory as the file."""

_FORMATS = "messages, conversations, instruction and output, or prompt and completion"


def find_conversations(path: Path) -> list[Path]:
    """The data files at ``path``: itself, or those in the folder and its subfolders, in the order of their names.

    Raises UserError if there is none.
    """
    if path.is_dir():
        lists = [file for file in path.rglob("*.json") if not any(p[0] == "." for p in file.relative_to(path).parts)]
        files = sorted([*find_files(path), *lists])
    else:
        files = [path] if path.name.lower().endswith(".json") and path.is_file() else find_files(path)
    files = [file for file in files if not file.name.lower().endswith(".txt") and file.name != MANIFEST]
    if not files:
        kinds = ", ".join(suffix for suffix in (".json", *SUFFIXES) if suffix != ".txt")
        raise UserError(f"there are no conversations in {path}; they are read from {kinds}")
    return files


def read_conversations(path: Path, bad: BadRows) -> Iterator[list[Message]]:
    """The conversations of one file; rows that are none go to ``bad`` with file and line."""
    for row in _read_json(path, bad) if path.name.lower().endswith(".json") else read_rows(path, bad):
        try:
            yield parse_conversation(row.value)
        except ValueError as error:
            bad.report(row.path, row.line, str(error))


def parse_conversation(value: Any) -> list[Message]:
    """The messages of one row in any of the formats.

    Raises:
        ValueError: saying what is wrong with the row.
    """
    if isinstance(value, list):
        messages = _messages(value)
    elif not isinstance(value, dict):
        raise ValueError("a conversation is an object or a list of messages")
    elif "messages" in value:
        messages = _messages(value["messages"])
    elif "conversations" in value:
        messages = [*_system(value), *_messages(value["conversations"])]
    elif "instruction" in value and "output" in value:
        messages = _alpaca(value)
    elif "prompt" in value and "completion" in value:
        messages = _turn(value["prompt"], "user", "prompt") + _turn(value["completion"], "assistant", "completion")
    else:
        raise ValueError(f"the object is no conversation: it has neither {_FORMATS}")
    answers = [message.content for message in messages if message.role == "assistant"]
    if not answers:
        raise ValueError("there is no answer of an assistant to learn from")
    if not all(answer.strip() for answer in answers):
        raise ValueError("an answer of the assistant is empty")
    return messages


def encode_document(tokenizer: Tokenizer, messages: list[Message]) -> Document:
    """A conversation as a document of a token store: the loss counts what the assistant says, end tokens included.

    Its ``n_bytes`` are those of the answers, so that bits per byte are those of what is counted.
    """
    ids, mask = encode_conversation(tokenizer, messages)
    n_bytes = sum(len(message.content.encode()) for message in messages if message.role == "assistant")
    return Document(ids, n_bytes, mask)


def _messages(value: Any) -> list[Message]:
    if not isinstance(value, list):
        raise ValueError("the messages are not a list")
    return [_message(one) for one in value]


def _message(value: Any) -> Message:
    """A message in OpenAI's form (role, content) or ShareGPT's (from, value)."""
    if not isinstance(value, dict):
        raise ValueError("a message is not an object")
    role, content = (value.get(new, value.get(old)) for new, old in (("role", "from"), ("content", "value")))
    if not isinstance(role, str) or role not in _ROLES:
        raise ValueError(f"the role of a message is {role!r:.80}, none of {', '.join(_ROLES)}")
    if isinstance(content, list):
        content = "".join(_part(part) for part in content)
    return Message(_ROLES[role], _text(content, "content of a message"))


def _part(value: Any) -> str:
    """The text of a part of a message that consists of several."""
    if not isinstance(value, dict) or value.get("type") != "text":
        raise ValueError("a message has a part that is not text")
    return _text(value.get("text"), "text of a message's part")


def _alpaca(value: dict[str, Any]) -> list[Message]:
    messages = _system(value)
    history = value.get("history") or []
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise ValueError("history is not a list of pairs of a question and an answer")
    for question, answer in history:
        messages += _turn(question, "user", "history") + _turn(answer, "assistant", "history")
    instruction, details = _text(value["instruction"], "instruction"), _text(value.get("input") or "", "input")
    question = f"{instruction}\n\n{details}" if instruction and details else instruction + details
    return [*messages, *_turn(question, "user", "instruction"), *_turn(value["output"], "assistant", "output")]


def _system(value: dict[str, Any]) -> list[Message]:
    return [Message("system", _text(value["system"], "system"))] if value.get("system") else []


def _turn(value: Any, role: str, name: str) -> list[Message]:
    return _messages(value) if isinstance(value, list) else [Message(role, _text(value, name))]


def _text(value: Any, name: str) -> str:
    """``value`` if it is text that a file could hold."""
    if not isinstance(value, str):
        raise ValueError(f"the {name} is not a string")
    if "\0" in value:
        raise ValueError(f"the {name} has a NUL character")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"the {name} has a lone surrogate, half of a character") from None
    return value


def _read_json(path: Path, bad: BadRows) -> Iterator[Row]:
    """The values in the list of a JSON file; a file that does not begin with a list is read as JSONL."""
    try:
        if path.stat().st_size > MAX_LIST_BYTES:
            raise UserError(
                f"{path} has more than {MAX_LIST_BYTES // 1_000_000} MB and would be read into memory whole; "
                "write it as .jsonl, a row a line"
            )
        content = path.read_bytes().removeprefix(codecs.BOM_UTF8).decode()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        bad.report(path, error.object.count(b"\n", 0, error.start) + 1, f"not UTF-8: {error.reason}")
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
            bad.report(path, error.lineno, f"not valid JSON: {error.msg}; what follows is left out")
            return
        except RecursionError:
            bad.report(path, line, "the JSON value is nested too deeply; what follows is left out")
            return
        yield Row(path, line, value)
        at = _after_space(content, at)
        if content.startswith(",", at):
            at = _after_space(content, at + 1)
        elif not content.startswith("]", at):
            line += content.count("\n", counted, at)
            bad.report(path, line, "the list breaks off or lacks a comma; what follows is left out")
            return


def _after_space(content: str, at: int) -> int:
    """The index of the first character from ``at`` on that is not white space."""
    while content[at : at + 1].isspace():
        at += 1
    return at
