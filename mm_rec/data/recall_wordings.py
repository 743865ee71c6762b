"""The wordings of rows that train recall (:mod:`mm_rec.data.recall_rows`): how a fact is said, listed and asked for.

A fact is a noun, a key and a value, such as "the weight of box 48 is 1730". The keys here are words of the text, codes
and numbered things, never names of people or places. None of these sentences may occur in the tests of recall.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CODE", "NOUNS", "TEXT", "Wordings"]

NOUNS = (
    *("weight", "price", "label", "shelf", "mark", "ledge", "signal", "drawer", "tag", "width", "depth", "batch"),
    *("grade", "score", "rank", "level", "stock", "ticket", "seat", "locker", "lot", "gauge", "dose", "quota", "delay"),
    *("offset", "index", "margin", "channel", "socket", "slot", "size", "limit", "rate", "stamp", "total"),
)


@dataclass(frozen=True)
class Wordings:
    """Templates of one kind of text, with ``{noun}``, ``{key}`` and ``{value}`` to be filled in.

    Attributes:
        statements: say a fact.
        questions: ask for it and answer.
        statements_without_key, questions_without_key: the same of a fact that has a noun alone.
        list_heads, list_lines: head and lines of a list of facts of one noun.
        again: before a passage of the text that comes once more; ends where the passage begins.
        separators: between text and what is inserted.
    """

    statements: tuple[str, ...]
    questions: tuple[str, ...]
    statements_without_key: tuple[str, ...]
    questions_without_key: tuple[str, ...]
    list_heads: tuple[str, ...]
    list_lines: tuple[str, ...]
    again: tuple[str, ...]
    separators: tuple[str, ...]


TEXT = Wordings(
    statements=(
        "Note: the {noun} of {key} is {value}.",
        "It was entered that {key} has the {noun} {value}.",
        "({key}: {noun} {value})",
        "As for {key}, its {noun} was set to {value}.",
        "The {noun} given for {key} was {value}.",
        "{key}, {noun}: {value}.",
        "In the margin stood: {key}, {noun} {value}.",
        "Let it be known that {value} is the {noun} of {key}.",
        "Under {key} one finds the {noun} {value}.",
        "For {key} the {noun} reads {value}.",
        "They wrote down {value} as the {noun} of {key}.",
        "The register lists {key} with the {noun} {value}.",
        "To {key} belongs the {noun} {value}.",
        "Whoever asks about {key} is told that the {noun} is {value}.",
        "{key} got a new {noun}, which is {value}.",
        "By the way, {key} has {value} for a {noun}.",
        "[{noun} of {key} = {value}]",
        "The clerk fixed the {noun} of {key} at {value}.",
    ),
    questions=(
        "What was the {noun} of {key}? It was {value}.",
        "The {noun} of {key} is {value}.",
        "Question: {noun} of {key}? Answer: {value}.",
        "Q: Which {noun} does {key} have?\nA: {value}",
        "As was said, the {noun} of {key} is {value}.",
        "Asked for the {noun} of {key}, one answers {value}.",
        "{key} has, as was written, the {noun} {value}.",
        "And once more the {noun} of {key}: {value}.",
        "Look up {key}: its {noun} is {value}.",
        "So the {noun} that belongs to {key} is {value}.",
        "Which {noun} goes with {key}? The answer is {value}.",
        "{noun} of {key}: {value}.",
        "For {key} the {noun} reads {value}.",
        "We read above that {key} has the {noun} {value}.",
        "Tell me the {noun} of {key}. That is {value}.",
        "Of {key} we know the {noun}, namely {value}.",
    ),
    statements_without_key=(
        "The {noun} agreed upon is {value}.",
        "For today the {noun} reads {value}.",
        "A {noun} was chosen, and it is {value}.",
        "They settled on the {noun} {value}.",
        "Keep the {noun} ready: {value}.",
        "The {noun}: {value}. Once again, the {noun}: {value}.",
    ),
    questions_without_key=(
        "The {noun} agreed upon was {value}.",
        "Which {noun} was it? It was {value}.",
        "Which {noun} holds today? Today {value} holds.",
        "Question: the {noun}? Answer: {value}.",
        "The {noun} was {value}.",
        "Whoever wants the {noun} is given {value}.",
    ),
    list_heads=("List of every {noun}:\n", "{noun}\n", "The {noun} of each:\n", "Table, by {noun}\n", "[{noun}]\n"),
    list_lines=(
        "{key}: {value}\n",
        "{key} - {value}\n",
        "{key} = {value}\n",
        "* {key} ({value})\n",
        "{key},{value}\n",
        "| {key} | {value} |\n",
        "{key} -> {value}\n",
        '"{key}": "{value}",\n',
        "{key}\t{value}\n",
    ),
    again=("It says again: ", "To repeat it: ", "And so once more, ", "The passage above: ", "", ""),
    separators=(" ", " ", "\n", "\n\n"),
)

CODE = Wordings(
    statements=(
        "# {noun} of {key}: {value}",
        "{key} = {value}  # {noun}",
        "{key}_{noun} = {value}",
        "# NOTE: {key} has the {noun} {value}",
        '{noun}s["{key}"] = {value}',
        "# {key} needs a {noun} of {value}",
        "{noun}.set({key}, {value})",
        '"""The {noun} of {key} is {value}."""',
    ),
    questions=(
        "# {noun} of {key}: {value}",
        "# the {noun} of {key} is {value}",
        "# what is the {noun} of {key}? {value}",
        'assert {noun}_of("{key}") == {value}',
        "print({key}.{noun})  # {value}",
        "self.assertEqual({key}.{noun}, {value})",
        ">>> {noun}_of({key})\n{value}",
        'expected = {{"{key} {noun}": {value}}}',
    ),
    statements_without_key=("{noun} = {value}", "DEFAULT_{noun} = {value}", "# {noun}: {value}"),
    questions_without_key=("assert {noun} == {value}", "# as above, {noun} is {value}", "print({noun})  # {value}"),
    list_heads=("{noun} = {{\n", "# {noun}\n", "{noun}s = dict(\n", "[{noun}]\n"),
    list_lines=("    {key}={value},\n", '    "{key}": {value},\n', "{key} = {value}\n", "{key}: {value}\n"),
    again=("# again:\n", "# copied from above\n", "", ""),
    separators=("\n", "\n\n"),
)
