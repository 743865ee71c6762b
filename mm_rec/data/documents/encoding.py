"""Finds out in which encoding a file's text is written.

UTF-8 and what begins with a byte order mark are certain. UTF-16 without one shows by its zero bytes. What is left are
the encodings of one byte a character from before Unicode, in which one byte stands for ``ş`` in Turkish and ``þ`` in
Icelandic. The languages of the Latin alphabet are told apart by their letters: a text is Turkish if its letters beyond
ASCII are those of Turkish. This decides short texts too, where statistics of a language fail (`charset_normalizer`
takes "Işık ve güneş" for Urdu). Other scripts, and texts that no alphabet fits, are left to that package.
"""

from __future__ import annotations

import codecs
import io
import re
from collections import Counter

from mm_rec.data.documents.kinds import LeftOutError
from mm_rec.translation import Translatable

__all__ = ["LABELS", "check_encoding", "decode", "find_encoding"]

SAMPLE_BYTES = 200_000
"""By which an encoding is judged."""

_ALPHABETS = {
    "Turkish": "çğıöşüâîû",
    "German": "äöüß",
    "French": "àâæçéèêëîïôœùûüÿ",
    "Spanish": "áéíóúüñºª",
    "Portuguese": "áâãàçéêíóôõúü",
    "Italian": "àèéìíîòóù",
    "Dutch": "áéëïíóöúüèê",
    "Swedish or Finnish": "åäöé",
    "Danish or Norwegian": "æøåé",
    "Icelandic": "áæéíðóöþúý",
    "Polish": "ąćęłńóśźż",
    "Czech or Slovak": "áäčďéěíĺľňóôöřŕšťúůüýž",
    "Hungarian": "áéíóöőúüű",
    "Romanian": "ăâîşţ",
    "Croatian or Slovene": "čćđšž",
    "several of Western Europe": "àáâãäåæçèéêëìíîïñòóôõöøœùúûüÿß",
}
"""Letters beyond ASCII by language."""

_WESTERN = (
    "German", "French", "Spanish", "Portuguese", "Italian", "Dutch", "Swedish or Finnish", "Danish or Norwegian",
    "Icelandic",
)  # fmt: skip
_CENTRAL = ("Polish", "Czech or Slovak", "Hungarian", "Romanian", "Croatian or Slovene")

_ENCODINGS = (
    ("cp1254", ("Turkish",)),
    ("cp1252", _WESTERN),
    ("cp1250", _CENTRAL),
    ("iso8859_2", _CENTRAL),
    ("cp857", ("Turkish",)),
    ("mac_turkish", ("Turkish",)),
    ("mac_roman", ("German", "French", "Spanish")),
    ("cp1252", ("several of Western Europe",)),
)
"""Encodings of Latin alphabets; of several that fit equally well the first is taken."""

_OTHER_SCRIPTS = (
    "cp1251", "koi8_r", "cp866", "cp1253", "cp1255", "cp1256", "cp874", "cp932", "euc_jp", "gb18030", "big5", "cp949",
)  # fmt: skip
"""Among which `charset_normalizer` chooses."""

_PUNCTUATION = set("’‘“”„‚‹›«»–—…•·§°©®™€£¢¥±²³µ¶×÷½¼¾¡¿†‡‰´¨¬\xa0\xad")
_GOOD_SHARE = 0.9
_LETTERS_IN_PUNCTUATION = re.compile(r"[^\W\d_][^\w\s\x00-\x7f’‘·\xad][^\W\d_]")
"""A sign between two letters is a letter of another encoding: ``mo¿e`` is Polish ``może``."""

LABELS = {"iso-8859-1": "cp1252", "latin-1": "cp1252", "latin1": "cp1252", "iso-8859-9": "cp1254", "latin5": "cp1254"}
"""What is meant by names that pages state (as browsers read them): the Windows encoding that extends each."""

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def check_encoding(name: str) -> str:
    """Returns the encoding of that name as Python knows it; raises LookupError if there is none for text."""
    found = codecs.lookup(LABELS.get(name.lower(), name))
    if not found._is_text_encoding:
        raise LookupError(f"{name} is no encoding of text")
    return found.name


def decode(content: bytes, encoding: str | None = None, stated: str | None = None) -> str:
    """Returns the text of a file with line ends as in Unix.

    Args:
        content: all bytes of the file.
        encoding: what the user says, which wins.
        stated: what the file itself says, which counts if it is not UTF-8.

    Raises:
        LeftOutError: if it is not text in that encoding, or in any that can be found.
    """
    name = encoding or find_encoding(content, stated)
    try:
        text = content.decode(name)
    except (UnicodeDecodeError, LookupError):
        raise LeftOutError(
            Translatable("not {encoding}", encoding=name) if encoding else "no encoding fits its bytes"
        ) from None
    if "\0" in text:
        raise LeftOutError("zero bytes in it, so it is no text")
    return io.IncrementalNewlineDecoder(None, translate=True).decode(text, final=True)


def find_encoding(content: bytes, stated: str | None = None) -> str:
    """Returns the encoding of a text, by its first SAMPLE_BYTES where it is not UTF-8.

    Raises:
        LeftOutError: if none is found.
    """
    for mark, name in _MARKS:
        if content.startswith(mark):
            return name
    if _is_utf8(content):
        return _without_mark(content) or "utf-8"
    sample = content[:SAMPLE_BYTES]
    if wide := _without_mark(sample):
        return wide
    if b"\0" in sample:
        raise LeftOutError("zero bytes in it, so it is no text")
    if stated is not None:
        try:
            content.decode(check_encoding(stated))
            return check_encoding(stated)
        except (LookupError, UnicodeDecodeError):
            pass  # pages state what they are not
    return _latin_encoding(sample) or _other_encoding(sample)


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def _without_mark(content: bytes) -> str | None:
    """UTF-16 that begins with no mark: of each two bytes one, always the same, is often zero."""
    sample = content[:SAMPLE_BYTES]
    if len(content) % 2 and len(content) <= SAMPLE_BYTES:
        return None
    even, odd = sample[::2].count(0), sample[1::2].count(0)
    half = len(sample) // 2
    for name, often, never in (("utf-16-le", odd, even), ("utf-16-be", even, odd)):
        if often > 0.3 * half and never <= 0.01 * half:
            return name
    return None


def _latin_encoding(sample: bytes) -> str | None:
    """The encoding in which the sample's letters beyond ASCII are those of one language."""
    best, best_share = None, _GOOD_SHARE
    for encoding, languages in _ENCODINGS:
        try:
            text = sample.decode(encoding)
        except UnicodeDecodeError:
            continue
        if _LETTERS_IN_PUNCTUATION.search(text):
            continue
        beyond = Counter(letter for letter in text if letter > "\x7f" and letter not in _PUNCTUATION)
        count, latin = beyond.total(), sum(letter.isalpha() for letter in text if letter <= "\x7f")
        for language in languages:
            alphabet = _ALPHABETS[language]
            letters = {*alphabet, *alphabet.upper(), *("İ" if language == "Turkish" else "")}
            share = sum(beyond[letter] for letter in letters) / count if count else 1.0
            if count > 2 * latin and (share < 1 or language != "Turkish"):  # another script, all beyond ASCII
                continue
            if share > best_share:
                best, best_share = encoding, share
    return best


def _other_encoding(sample: bytes) -> str:
    try:
        import charset_normalizer
    except ModuleNotFoundError:
        raise LeftOutError("its encoding is not known without the extra documents; name it with --encoding") from None
    found = charset_normalizer.from_bytes(sample, cp_isolation=list(_OTHER_SCRIPTS)).best()
    if found is None:
        raise LeftOutError("no encoding fits its bytes; name it with --encoding")
    return str(found.encoding)
