"""Every data set that can be named with ``--source``, as one table."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

from mm_rec.errors import UserError
from mm_rec.translation import Translatable, join_texts

__all__ = ["BUILTIN", "DEFAULT_SOURCES", "SOURCES", "Source", "describe_sources", "find_source"]

Kind = Literal["text", "code", "instruct", "chat"]

BUILTIN = "builtin"
"""Names what is installed on this machine (:mod:`mm_rec.data.download.builtin`), for which no hub is asked."""


@dataclass(frozen=True)
class Source:
    """A data set on the hub.

    Attributes:
        name: what ``--source`` takes.
        kind: folder that its samples go to: ``text``, ``code``, ``instruct`` or ``chat``.
        hub_id: owner and name on the hub.
        config: name of the subset, if there are several.
        field: column that holds the text; None keeps whole rows, as conversations need.
        licence: in short; for sets of many works that of the collection.
        split: part of the set that is read.
        revision: branch; the commit it stands for is pinned when a download starts.
        data_dir: folder inside of the set.
        data_files: files inside of the set, where its own description can't be used.
        file: name of the file it is written to, without ending; the source's name if empty.
        gated: whether the owner wants terms to be accepted first.
        note: what a user should know.
    """

    name: str
    kind: Kind
    hub_id: str
    config: str | None
    field: str | None
    licence: str
    split: str = "train"
    revision: str = "main"
    data_dir: str | None = None
    data_files: str | None = None
    file: str = ""
    gated: bool = False
    note: str = ""

    @property
    def path(self) -> str:
        """Where the samples go, relative to the data folder."""
        return f"{self.kind}/{self.file or self.name}.jsonl"


# Bare names such as `wikitext` no longer resolve on the hub: each row has the owner's.
_TABLE = (
    Source("wikitext", "text", "Salesforce/wikitext", "wikitext-103-raw-v1", "text", "CC-BY-SA-3.0 and GFDL",
           note="WikiText-103, paragraphs of good and featured Wikipedia articles"),
    Source("wikitext-2", "text", "Salesforce/wikitext", "wikitext-2-raw-v1", "text", "CC-BY-SA-3.0 and GFDL",
           note="the same from 600 articles"),
    Source("openwebtext", "text", "Skylion007/openwebtext", None, "text", "CC0-1.0",
           revision="refs/convert/parquet", data_files="plain_text/*/*.parquet",
           note="web pages linked from Reddit; read from the hub's own conversion, since the set is a script"),
    Source("c4", "text", "allenai/c4", "en", "text", "ODC-BY", note="cleaned web pages of Common Crawl"),
    Source("pile", "text", "monology/pile-uncopyrighted", None, "text", "as each work",
           note="the Pile without its copyrighted parts; the first host, the-eye.eu, is gone"),
    Source("the-stack", "code", "bigcode/the-stack-dedup", None, "content", "as each file, permissive", gated=True,
           data_dir="data/python", note="Python files of GitHub without near-duplicates"),
    Source("python", "code", "codeparrot/codeparrot-clean", None, "content", "as each file", file="code",
           note="Python files of GitHub, cleaned"),
    Source("codesearchnet", "code", "code-search-net/code_search_net", "python", "whole_func_string",
           "as each file", note="Python functions with docstrings; the first host, an S3 bucket, answers 403"),
    Source("alpaca", "instruct", "tatsu-lab/alpaca", None, None, "CC-BY-NC-4.0", note="52,000 instructions"),
    Source("sharegpt", "chat", "liyucheng/ShareGPT90K", None, None, "CC0-1.0",
           note="conversations with an assistant, shared by its users"),
    Source("ultrachat", "chat", "HuggingFaceH4/ultrachat_200k", None, None, "MIT", split="train_sft",
           note="conversations as `messages` with roles"),
)  # fmt: skip

SOURCES = {source.name: source for source in _TABLE}

DEFAULT_SOURCES = ("wikitext", "python")

_OTHER_NAMES = {
    "wikitext-103": "wikitext",
    "the-pile": "pile",
    "the_pile": "pile",
    "stack": "the-stack",
    "the_stack": "the-stack",
    "code": "python",
    "python-code": "python",
    "code_search_net": "codesearchnet",
}


def find_source(name: str) -> Source:
    """The row of a name in any common spelling; raises UserError for an unknown one.

    >>> find_source("WikiText-103").hub_id
    'Salesforce/wikitext'
    """
    key = name.lower()
    key = _OTHER_NAMES.get(key, key)
    if key not in SOURCES:
        close = difflib.get_close_matches(key, SOURCES, 1)
        hint = Translatable("there are {names}", names=", ".join([*SOURCES, BUILTIN]))
        if close:
            hint = Translatable("did you mean {name}?", name=close[0])
        raise UserError("there is no source {name!r}; {hint}", name=name, hint=hint)
    return SOURCES[key]


def describe_sources() -> Translatable:
    """The table for people, a line a source."""
    lines = [
        Translatable(
            "  {name:14} text and code of this machine's own Python installation; needs no network", name=BUILTIN
        )
    ]
    for source in _TABLE:
        line = Translatable("{id}, licence {licence}", id=source.hub_id, licence=Translatable(source.licence))
        if source.note:
            line = join_texts("; ", [Translatable(source.note), line])
        if source.gated:
            line = Translatable("{line}, gated: accept its terms there first and set HF_TOKEN", line=line)
        lines.append(Translatable("  {name:14} {kind}: {line}", name=source.name, kind=source.kind, line=line))
    return join_texts("\n", lines)
