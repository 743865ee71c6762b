"""Which language the user reads, and its catalogue of translations.

A catalogue is a ``.po`` file beside this module, which is read as it is: a compiled one would have to be built in every
checkout, or be merged as a binary file.
"""

from __future__ import annotations

import functools
import gettext
import json
import os
import re
from pathlib import Path

__all__ = ["choose_language", "read_catalogue", "read_entries"]

FOLDER = Path(__file__).parent
LOCALE_VARIABLES = ("MM_REC_LANG", "LC_ALL", "LC_MESSAGES", "LANG")
"""Variables of the environment that may name a locale; the first that is set counts."""

_TEXT = r'("(?:[^"\\]|\\.)*"(?:\n"(?:[^"\\]|\\.)*")*)'
_FIELD = re.compile(r"\{([a-z_0-9]+)[^{}]*\}")
_ENTRY = re.compile(rf"^msgid {_TEXT}\nmsgstr {_TEXT}$", re.MULTILINE)


class Catalogue(gettext.NullTranslations):
    """Translations by English text; what has none stays English."""

    def __init__(self, entries: dict[str, str]) -> None:
        super().__init__()
        self._entries = entries

    def gettext(self, message: str) -> str:
        """Returns the translation of ``message``."""
        return self._entries.get(message) or message

    def ngettext(self, msgid1: str, msgid2: str, n: int) -> str:
        """Returns the translation of the text for one, or for several; each has an entry of its own."""
        return self.gettext(msgid1 if n == 1 else msgid2)

    def translate_formatted(self, text: str) -> str:
        """Returns the translation of a text whose fields are filled in, found by its template; else ``text``."""
        for pattern, translation in self._patterns:
            if found := pattern.fullmatch(text):
                return _FIELD.sub(r"{\1}", translation).format(**found.groupdict())
        return text

    @functools.cached_property
    def _patterns(self) -> list[tuple[re.Pattern[str], str]]:
        """A pattern for each text with its translation; those of the most words of their own come first."""
        own = {template: len(_FIELD.sub("", template)) for template in self._entries}
        longest_first = sorted(self._entries, key=own.__getitem__, reverse=True)
        return [(_pattern(template), self._entries[template]) for template in longest_first]


def choose_language() -> str:
    """Returns the language of the user's locale, such as ``tr``; ``en`` where the environment names none."""
    locale = next((value for name in LOCALE_VARIABLES if (value := os.environ.get(name))), "")
    language = re.split(r"[-_.@]", locale)[0].lower()
    return language if language.isalpha() and language not in ("c", "posix") else "en"


@functools.cache
def read_catalogue(language: str) -> Catalogue:
    """Returns the catalogue of a language; an empty one if there is none."""
    path = FOLDER / f"{language}.po"
    return Catalogue(read_entries(path.read_text(encoding="utf-8")) if path.is_file() else {})


def read_entries(content: str) -> dict[str, str]:
    r"""Returns the translations in the content of a ``.po`` file by their English text, without its header.

    >>> read_entries('msgid "a\\n"\n"b"\nmsgstr "c"')
    {'a\nb': 'c'}
    """
    entries = {_unquoted(text): _unquoted(translation) for text, translation in _ENTRY.findall(content)}
    entries.pop("", None)
    return entries


def _pattern(template: str) -> re.Pattern[str]:
    """Matches what a template becomes when its fields are filled in."""
    pieces, seen = [], set[str]()
    for index, piece in enumerate(_FIELD.split(template)):
        if index % 2 == 0:
            pieces.append(re.escape(piece))
        else:
            pieces.append(f"(?P={piece})" if piece in seen else f"(?P<{piece}>.+)")
            seen.add(piece)
    return re.compile("".join(pieces), re.DOTALL)


def _unquoted(text: str) -> str:
    """The string that one or more quoted lines stand for; their escapes are those of JSON."""
    return "".join(json.loads(line) for line in text.split("\n"))
