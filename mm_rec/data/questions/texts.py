"""Entries of prose: questions with their answers, definitions, and sections under their headings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from mm_rec.data.questions.entries import LONGEST_ANSWER, LONGEST_PASSAGE, Entry, Fact, join_lines, sentences

__all__ = ["entries_of_text"]

_UNDERLINE = re.compile(r"([=\-~^\"'*+#`.:_])\1{2,}")
_LIST_SIGN = r"(?:[-*+•]|\d+[.)])\s+"
_LIST = re.compile(_LIST_SIGN)
_ASKED = re.compile(r"(?:Q|Question|S|Soru)\s*[:.]\s*(.+\?)\s+(?:A|Answer|C|Cevap|Yanıt)\s*[:.]\s*(.+)", re.S)
_LINK = re.compile(r"\[([^\]\[]+)\]\([^()\s]+\)")
_EMPHASIS = re.compile(r"\*\*")
_QUOTES = "`*\"'“”‘’_"
_TERM = r"(?:[`*\"“]{0,2})([^\W\d_][\w .+/'’-]{1,48}?)(?:[`*\"”]{0,2})"
_LISTED = re.compile(rf"(?:{_LIST_SIGN})?(?:\*\*|``?|_)?{_TERM}(?:\*\*|``?|_)?\s*(?::|--|–|—|: -)\s+(.+)", re.S)
_DEFINES = re.compile(
    rf"(?:(?:An?|The)\s+)?{_TERM}\s+(?:is|are|means|refers to|denotes)\s+(?:an?|the|any|one|used|what)\b"
)
_DEFINES_TURKISH = re.compile(rf"{_TERM}(?:,|:| ise)\s.*(?:d[ıiuü]r|t[ıiuü]r|denir|ad[ıi]d[ıi]r)(?:lar|ler)?\.$")
_FIRST_WORDS = """it this that these those there he she they we you i one what which who here such other note example
    question answer new changed deprecated default first second last next following result value same bu şu o bunlar
    şunlar onlar burada"""  # of what looks like a term and is none
_NO_TERMS = frozenset(_FIRST_WORDS.split())
_TURKISH = re.compile(r"[ğışĞİŞ]")
_MOST_TERM_WORDS = 4


class _Section(NamedTuple):
    """Paragraphs on one line each, under their heading; empty before the first."""

    heading: str
    paragraphs: list[str]


def entries_of_text(text: str) -> Iterator[Entry]:
    """Yields the entries of a document: Markdown, reStructuredText, or paragraphs with empty lines between them."""
    language = "tr" if len(_TURKISH.findall(text)) >= max(2, len(text) // 500) else "en"
    for heading, paragraphs in _sections(text):
        if paragraphs and heading:
            entry = _section(heading, paragraphs[0], language)
            if entry is not None:
                yield entry
        for paragraph in paragraphs:
            entry = _asked(paragraph, language) or _definition(paragraph, language)
            if entry is not None:
                yield entry


def _sections(text: str) -> Iterator[_Section]:
    heading, block = "", list[str]()
    paragraphs: list[str] = []
    is_code = False
    lines = text.expandtabs().splitlines()
    for at, line in enumerate([*lines, ""]):
        stripped = line.strip()
        if stripped.startswith(("```", "~~~")):
            is_code = not is_code
            block.clear()
            continue
        if is_code:
            continue
        below = lines[at + 1].strip() if at + 1 < len(lines) else ""
        is_rst = bool(stripped) and not block and bool(_UNDERLINE.fullmatch(below)) and len(below) >= len(stripped) - 2
        is_markdown = bool(re.match(r"#{1,6}\s+\S", stripped))
        if is_rst or is_markdown:
            yield _Section(heading, paragraphs)
            heading, paragraphs = stripped.strip("# ").strip(), []
            block.clear()
        elif not stripped or _UNDERLINE.fullmatch(stripped) or (block and _LIST.match(stripped)):
            if block:
                paragraphs.append(_paragraph(block))
            block = [line] if stripped and not _UNDERLINE.fullmatch(stripped) else []
        else:
            block.append(line)
    yield _Section(heading, paragraphs)


def _paragraph(block: list[str]) -> str:
    """The lines of a paragraph as one, without emphasis and the addresses of links.

    A term over its indented definition, as in a glossary, gets a colon.
    """
    block = [_EMPHASIS.sub("", _LINK.sub(r"\1", line)) for line in block]
    first, *others = block
    indents = [len(line) - len(line.lstrip()) for line in block]
    is_glossary = bool(others) and min(indents[1:]) > indents[0] and not _LIST.match(first.strip())
    if is_glossary and len(first.split()) <= _MOST_TERM_WORDS and first.strip()[-1] not in ".,:;":
        return f"{first.strip()}: {join_lines(' '.join(others))}"
    return join_lines(" ".join(block))


def _section(heading: str, paragraph: str, language: str) -> Entry | None:
    """The entry of a heading: a question with its answer, or a section whose first sentence is asked for."""
    heading = re.sub(r"^\d+(?:\.\d+)*\.?\s+", "", heading).strip(_QUOTES)
    first = sentences(paragraph)[0]
    if not 4 <= len(heading) <= 80 or not _is_answer(first):
        return None
    kind = "asked" if heading.endswith("?") else "section"
    return Entry(heading, heading, _passage(f"{heading}\n{paragraph}", first), (Fact(kind, first),), language)


def _asked(paragraph: str, language: str) -> Entry | None:
    found = _ASKED.fullmatch(paragraph)
    if found is None:
        return None
    question, answer = found[1].strip(), sentences(found[2])[0]
    if not _is_answer(answer):
        return None
    return Entry(question, question, _passage(paragraph, answer), (Fact("asked", answer),), language)


def _definition(paragraph: str, language: str) -> Entry | None:
    listed = _LISTED.fullmatch(paragraph)
    if listed is not None:
        term, answer = listed[1].strip(_QUOTES + " "), sentences(listed[2])[0]
        if _is_term(term) and _is_answer(answer):
            return Entry(term, term, _passage(paragraph, answer), (Fact("definition", answer),), language)
        return None
    pattern = _DEFINES_TURKISH if language == "tr" else _DEFINES
    for sentence in sentences(paragraph):
        found = pattern.match(sentence)
        if found is not None and _is_term(found[1]) and _is_answer(sentence):
            term = found[1].strip(_QUOTES + " ")
            return Entry(term, term, _passage(paragraph, sentence), (Fact("definition", sentence),), language)
    return None


def _passage(text: str, answer: str) -> str:
    """The sentences of ``text`` up to the answer and on, as many as fit."""
    begin = text.index(answer)
    if begin + len(answer) > LONGEST_PASSAGE:
        text = text[begin:]
    if len(text) <= LONGEST_PASSAGE:
        return text
    end = text.index(answer) + len(answer)
    kept = text[:end]
    for sentence in sentences(text[end:].lstrip()):
        if len(kept) + 1 + len(sentence) > LONGEST_PASSAGE:
            break
        kept += f" {sentence}"
    return kept


def _is_term(term: str) -> bool:
    words = term.split()
    return 0 < len(words) <= _MOST_TERM_WORDS and len(term) > 2 and words[0].casefold() not in _NO_TERMS


def _is_answer(text: str) -> bool:
    """Whether a text reads like an answer: words, a sentence's length, and no mark-up in the main."""
    if len(text.split()) < 4 or len(text) > LONGEST_ANSWER:
        return False
    letters = sum(one.isalpha() or one.isspace() for one in text)
    is_complete = text[-1] not in ":;," and text[0] not in "<:|[" and not _LIST.match(text)
    return letters >= 0.85 * len(text) and is_complete
