"""What a message of a conversation is: one description for the chat template, training data, the server and Python.

    {"role": NAME, "content": TEXT}      or      {"role": NAME, "content": [{"type": "text", "text": TEXT}, ...]}

A field that is null says nothing, as if it weren't there. Names of roles are :data:`ROLE_NAMES`, kinds of parts
:data:`TEXT_PARTS`. What a model of text can't read (:data:`UNREADABLE`) makes a message unusable; other fields, such
as ``name``, are not shown to the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mm_rec.translation import Translatable

__all__ = [
    "ROLES", "ROLE_NAMES", "TEXT_PARTS", "UNREADABLE", "Message", "MessageError", "first_filled", "is_empty",
    "read_content", "read_message", "without_nulls",
]  # fmt: skip

ROLES = ("system", "user", "assistant")

ROLE_NAMES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
}
"""The names that roles have in other programs' conversations, and which of :data:`ROLES` each means."""

TEXT_PARTS = ("text", "input_text", "output_text")
"""Types of the parts that a content may consist of."""

UNREADABLE = ("tool_calls", "function_call", "audio", "images", "refusal")
"""Fields that say something beside the content; a message may have them empty or null."""


class Message(NamedTuple):
    """One message; ``role`` is one of :data:`ROLE_NAMES`, and what was read has one of :data:`ROLES`."""

    role: str
    content: str


class MessageError(ValueError):
    """A value is no message; ``path`` leads to the place in it that is wrong."""

    def __init__(self, problem: str, *path: str | int) -> None:
        super().__init__(problem)
        self.path = path


def without_nulls(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields that are there: neither null nor NaN, which pandas writes in its place.

    >>> without_nulls({"text": "a", "content": None, "code": float("nan")})
    {'text': 'a'}
    """
    return {name: value for name, value in fields.items() if value is not None and not _is_nan(value)}


def is_empty(value: Any) -> bool:
    """Whether a field that is there holds nothing: an empty list or object, or a text without a letter or sign.

    >>> is_empty(" "), is_empty([]), is_empty(0)
    (True, True, False)
    """
    return not value.strip() if isinstance(value, str) else isinstance(value, list | dict) and not value


def first_filled(fields: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """Returns the first of ``names`` whose field holds something, else the first that is there; None if none is.

    A table of several formats has all their fields in each row, and those of other formats may be empty.

    >>> first_filled({"text": "", "content": "a"}, ("text", "content", "code"))
    'content'
    """
    there = [name for name in names if name in fields]
    return next((name for name in there if not is_empty(fields[name])), there[0] if there else None)


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and value != value


def read_message(value: Any) -> Message:
    """Returns the message that ``value`` is, with one of :data:`ROLES`.

    >>> read_message({"role": "developer", "content": [{"type": "text", "text": "Be brief."}], "name": None})
    Message(role='system', content='Be brief.')

    Raises:
        MessageError: saying what is wrong with it.
    """
    if not isinstance(value, Mapping):
        raise MessageError(Translatable("a message is not an object with role and content"))
    fields = without_nulls(value)
    role = fields.get("role")
    if not isinstance(role, str) or role not in ROLE_NAMES:
        raise MessageError(
            Translatable(
                "the role of a message is {role!r:.80}; use one of {names}",
                role=role,
                names=", ".join(ROLE_NAMES),
            ),
            "role",
        )
    for name in UNREADABLE:
        if fields.get(name):
            raise MessageError(
                Translatable("a message has {name}, and this model reads text only; say it in the content", name=name),
                name,
            )
    if "content" not in fields:
        raise MessageError(Translatable("a message has no content"), "content")
    return Message(ROLE_NAMES[role], read_content(fields["content"]))


def read_content(value: Any) -> str:
    """Returns the text of a content: a string, or the parts of a list one after the other.

    Raises:
        MessageError: if it is neither, or a part is not text.
    """
    if isinstance(value, str):
        return _unicode(value, "content")
    if not isinstance(value, list) or not value:
        raise MessageError(Translatable("the content of a message is neither a string nor a list of parts"), "content")
    return "".join(_read_part(part, index) for index, part in enumerate(value))


def _read_part(value: Any, index: int) -> str:
    fields = without_nulls(value) if isinstance(value, Mapping) else {}
    kind = fields.get("type")
    if kind not in TEXT_PARTS:
        problem = Translatable(
            "a message has a part of type {kind!r:.80}, and this model reads text only; say it in words", kind=kind
        )
        raise MessageError(problem, "content", index, "type")
    if not isinstance(fields.get("text"), str):
        raise MessageError(Translatable("a part of a message has no text"), "content", index, "text")
    return _unicode(fields["text"], "content", index, "text")


def _unicode(text: str, *path: str | int) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise MessageError(Translatable("a message has a lone surrogate, half of a character"), *path) from None
    return text
