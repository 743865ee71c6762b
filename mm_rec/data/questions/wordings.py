"""How questions are worded: several templates of each kind, in each language.

``{name}`` stands for the entry and ``{subject}`` for what is asked about in it. A question that comes with a
passage is of the sort ``open``, others are of the sort ``memory``.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["MEMORY_KINDS", "WORDINGS"]

_ENGLISH = {
    "does": (
        "What does `{name}` do?",
        "What is `{name}` for?",
        "Describe `{name}` in one sentence.",
        "What happens when `{name}` is called?",
    ),
    "returns": (
        "What does `{name}` return?",
        "What is the result of `{name}`?",
        "What do I get back from `{name}`?",
    ),
    "raises": (
        "Which exception does `{name}` raise, and when?",
        "When does `{name}` raise an exception?",
    ),
    "parameters": (
        "Which parameters does `{name}` take?",
        "What are the parameters of `{name}`?",
        "What arguments can be passed to `{name}`?",
    ),
    "parameter": (
        "What is the parameter `{subject}` of `{name}`?",
        "What does `{subject}` mean in `{name}`?",
    ),
    "default": (
        "What is the default of `{subject}` in `{name}`?",
        "Which value does `{subject}` of `{name}` have if it is not given?",
        "What is `{subject}` set to by default in `{name}`?",
    ),
    "value": (
        "Which expression does `{name}` return?",
        "What does the code of `{name}` return?",
    ),
    "exception": (
        "Which exception does the code of `{name}` raise?",
        "What is raised in `{name}`?",
    ),
    "class": (
        "What is `{name}`?",
        "What is the class `{name}` for?",
        "Describe the class `{name}`.",
    ),
    "bases": (
        "Which classes does `{name}` inherit from?",
        "What are the base classes of `{name}`?",
    ),
    "definition": (
        "What is {name}?",
        "What does the term {name} mean?",
        "Define {name}.",
        "Explain {name} in one sentence.",
    ),
    "section": (
        'What does the section "{name}" say first?',
        'How does the section "{name}" begin?',
    ),
    "asked": ("{name}",),
}

_TURKISH = {
    "definition": ("{name} nedir?", "{name} ne demektir?", "{name} terimini açıklayın."),
    "section": ('"{name}" bölümü nasıl başlar?', '"{name}" bölümünde ilk olarak ne denir?'),
    "asked": ("{name}",),
}

WORDINGS: Mapping[str, Mapping[str, tuple[str, ...]]] = {"en": _ENGLISH, "tr": _TURKISH}
"""Templates by language and kind."""

MEMORY_KINDS = frozenset({"does", "parameters", "class", "definition", "asked"})
"""Kinds that can be asked without a passage. A default can be guessed, and sections are named alike everywhere."""
