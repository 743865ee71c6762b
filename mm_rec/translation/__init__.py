"""What people read, in their language: texts with fields, and the catalogues that translate them.

The text of every message is English. It is what logs, records, JSON and tests have. Only where a text reaches a person,
:func:`translate` gives it in the language of the locale. ``LANGUAGE.po`` holds the translations in gettext's format.
"""

from mm_rec.translation.catalogue import choose_language, read_catalogue
from mm_rec.translation.command_line import HelpFormatter, translated_argparse
from mm_rec.translation.translatable import Translatable, join_texts, translate, translate_record

__all__ = [
    "HelpFormatter",
    "Translatable",
    "choose_language",
    "join_texts",
    "read_catalogue",
    "translate",
    "translate_record",
    "translated_argparse",
]
