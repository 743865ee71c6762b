"""The text of HTML pages, which EPUB books are made of too."""

from __future__ import annotations

import re
from html.parser import HTMLParser

from mm_rec.data.documents.encoding import decode

__all__ = ["html_text", "read_html", "tidy"]

_LEFT_OUT = {
    "script",
    "style",
    "template",
    "noscript",
    "nav",
    "svg",
    "math",
    "head",
    "iframe",
    "object",
    "select",
    "button",
}
"""Elements whose content is not read as text; the title of the head is."""

_BLOCKS = {
    "address", "article", "aside", "blockquote", "body", "caption", "center", "dd", "details", "dialog", "div", "dl",
    "dt", "fieldset", "figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hgroup",
    "hr", "html", "li", "main", "menu", "nav", "ol", "p", "pre", "section", "summary", "table", "tbody", "tfoot",
    "thead", "title", "tr", "ul",
}  # fmt: skip
_PARAGRAPHS = {"p", "h1", "h2", "h3", "h4", "h5", "h6", "pre", "table", "blockquote", "ul", "ol", "dl", "title"}
"""Elements that a line, and an empty line, separates from what is around them."""

_VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
_STATED = re.compile(rb"""(?:charset|encoding)\s*=\s*["']?\s*([A-Za-z0-9_.:-]{2,40})""", re.I)
_SPACES = re.compile(r"[ \t\r\n\f]+")
_MANY_LINES = re.compile(r"\n{3,}")


def read_html(content: bytes, encoding: str | None) -> str:
    """Returns the text of a page; its encoding may stand in it."""
    stated = _STATED.search(content[:4096])
    return html_text(decode(content, encoding, stated[1].decode() if stated else None))


def html_text(page: str) -> str:
    r"""Returns the text of an HTML page as a browser would show it, without formats, scripts and menus of choices.

    >>> html_text("<title>A</title><p>One\n<b>two</b>.<script>x</script><table><tr><td>3<td>4</table>")
    'A\n\nOne two.\n\n3\t4'
    """
    reader = _Reader()
    reader.feed(page)
    reader.close()
    return tidy("".join(reader.pieces))


def tidy(text: str) -> str:
    r"""Returns ``text`` without spaces at the ends of lines and without more than one empty line in a row.

    >>> tidy(" a \n\n\n\n b\t\n")
    ' a\n\n b'
    """
    lines = [line.rstrip() for line in text.replace("\xa0", " ").split("\n")]
    return _MANY_LINES.sub("\n\n", "\n".join(lines)).strip("\n")


class _Reader(HTMLParser):
    """Collects text piece by piece; keeps no tree, so that nesting costs nothing."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.pieces: list[str] = []
        self._skipping: list[str] = []
        self._preformatted = 0
        self._in_title = False
        self._cells = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Take the begin of an element."""
        if tag == "body":
            self._skipping.clear()  # the end of the head may be left out
        if self._skipping:
            if tag == self._skipping[-1] and tag not in _VOID:
                self._skipping.append(tag)
            self._in_title |= tag == "title" and self._skipping == ["head"]
            return
        if tag in _LEFT_OUT or ("hidden" in dict(attrs) and tag not in _VOID):
            self._skipping.append(tag)
            return
        self._in_title |= tag == "title"
        self._preformatted += tag == "pre"
        if tag == "tr":
            self._cells = 0
        if tag in ("td", "th"):
            if self._cells:
                self.pieces.append("\t")
            self._cells += 1
        if tag == "br":
            self.pieces.append("\n")
        self._separate(tag)

    def handle_endtag(self, tag: str) -> None:
        """Take the end of an element."""
        if tag == "title" and self._in_title:
            self._in_title = False
            self._separate(tag)
        if self._skipping:
            if tag == self._skipping[-1]:
                self._skipping.pop()
            return
        self._preformatted -= tag == "pre" and self._preformatted > 0
        self._separate(tag)

    def handle_data(self, data: str) -> None:
        """Take text."""
        if self._skipping and not self._in_title:
            return
        if not self._preformatted:
            data = _SPACES.sub(" ", data)
            if data.startswith(" ") and (not self.pieces or self.pieces[-1][-1:] in " \n\t"):
                data = data[1:]
        if data:
            self.pieces.append(data)

    def _separate(self, tag: str) -> None:
        if tag in _BLOCKS and self.pieces:
            self.pieces.append("\n\n" if tag in _PARAGRAPHS else "\n" if self.pieces[-1][-1:] != "\n" else "")
