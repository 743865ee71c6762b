"""Help and errors of ``argparse`` in the language of the user's locale."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

from mm_rec.translation.catalogue import choose_language, read_catalogue
from mm_rec.translation.translatable import translate

__all__ = ["HelpFormatter", "translated_argparse"]


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Translates description, headings and the help of every option while it formats them."""

    def add_text(self, text: str | None) -> None:  # noqa: D102
        super().add_text(text if text is None or text == argparse.SUPPRESS else translate(text))

    def start_section(self, heading: str | None) -> None:  # noqa: D102
        super().start_section(heading if heading is None or heading == argparse.SUPPRESS else translate(heading))

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return None if action.help is None else translate(action.help)


@contextmanager
def translated_argparse() -> Iterator[None]:
    """While the context lasts, argparse's own errors and the word "usage" are in the language of the user's locale.

    argparse asks the functions of gettext under the names ``_`` and ``ngettext``, for a catalogue that would have to be
    compiled and installed for the whole process.
    """
    catalogue = read_catalogue(choose_language())
    names = vars(argparse)
    before = {name: names[name] for name in ("_", "ngettext")}
    names.update(_=catalogue.gettext, ngettext=catalogue.ngettext)
    try:
        yield
    finally:
        names.update(before)
