"""Texts with fields, which can be shown in another language than they were written in."""

from __future__ import annotations

from collections.abc import Iterable

from mm_rec.translation.catalogue import choose_language, read_catalogue

__all__ = ["Translatable", "join_texts", "translate", "translate_record"]


class Translatable(str):
    """An English text that remembers the template and the fields that it was made from.

    It is a string, so that it can go wherever text goes; what reaches a person passes :func:`translate`.

    Args:
        template: text with fields in braces, as ``str.format`` takes it; without fields, braces are braces.
        fields: their values; those that are translatable, or errors that are, are translated too.

    >>> Translatable("{count:,} documents", count=1200)
    '1,200 documents'
    """

    template: str
    fields: dict[str, object]

    def __new__(cls, template: str, /, **fields: object) -> Translatable:  # noqa: D102
        if isinstance(template, Translatable) and not fields:
            return template
        self = super().__new__(cls, template.format(**fields) if fields else template)
        self.template = template
        self.fields = fields
        return self


def join_texts(separator: str, parts: Iterable[str]) -> Translatable:
    """Returns one text of several; each is translated on its own."""
    fields = {f"part{index}": part for index, part in enumerate(parts)}
    return Translatable(separator.join(f"{{{name}}}" for name in fields), **fields)


def translate(text: str | BaseException, /, **fields: object) -> str:
    """Returns a text, a template with its fields, or what an error says, in the language of the user's locale."""
    if isinstance(text, BaseException):
        first = text.args[0] if text.args else None
        text = first if isinstance(first, Translatable) else str(text)
    if fields:
        text = Translatable(text, **fields)
    catalogue = read_catalogue(choose_language())
    if not isinstance(text, Translatable):
        return catalogue.gettext(text)
    template = catalogue.gettext(text.template)
    if not text.fields:
        return template
    return template.format(**{name: _in_language(value) for name, value in text.fields.items()})


def translate_record(text: str) -> str:
    """Returns an English text without its fields, as a file has it, in the language of the user's locale."""
    return read_catalogue(choose_language()).translate_formatted(text)


def _in_language(value: object) -> object:
    return translate(value) if isinstance(value, Translatable | BaseException) else value
