"""Every data set that can be named with ``--source``, as one table."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mm_rec.errors import UserError
from mm_rec.translation import Translatable, join_texts

__all__ = [
    "BUILTIN",
    "DEFAULT_SOURCES",
    "DEFAULT_TEXT",
    "ENGLISH",
    "SOURCES",
    "Source",
    "describe_sources",
    "find_source",
]

Kind = Literal["text", "code", "instruct", "chat"]

ENGLISH = "en"
"""The language of the sources that have only one, and of what is downloaded if none is named."""

FINEWEB_CODES = {
    "ar": "arb_Arab", "az": "azj_Latn", "bg": "bul_Cyrl", "cs": "ces_Latn", "da": "dan_Latn", "de": "deu_Latn",
    "el": "ell_Grek", "es": "spa_Latn", "fa": "fas_Arab", "fi": "fin_Latn", "fr": "fra_Latn", "hi": "hin_Deva",
    "hu": "hun_Latn", "id": "ind_Latn", "it": "ita_Latn", "ja": "jpn_Jpan", "ko": "kor_Hang", "nl": "nld_Latn",
    "no": "nob_Latn", "pl": "pol_Latn", "pt": "por_Latn", "ro": "ron_Latn", "ru": "rus_Cyrl", "sv": "swe_Latn",
    "th": "tha_Thai", "tr": "tur_Latn", "uk": "ukr_Cyrl", "vi": "vie_Latn", "zh": "cmn_Hani",
}  # fmt: skip
"""What the configurations of FineWeb-2 call a language: its ISO 639-3 code and its script."""

WIKIPEDIA_CODES = {code: code for code in (ENGLISH, *FINEWEB_CODES)}

OASST_CODES = {
    code: {"no": "nb", "pt": "pt-BR", "uk": "uk-UA"}.get(code, code)
    for code in (
        "ar", "bg", "cs", "da", "de", "el", ENGLISH, "es", "fa", "fi", "fr", "hu", "id", "it", "ja", "ko", "nl", "no",
        "pl", "pt", "ro", "ru", "sv", "th", "tr", "uk", "vi", "zh",
    )
}  # fmt: skip
"""What the column ``lang`` of OpenAssistant's messages calls a language."""

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
        size: what there is of it, in short.
        languages: codes of the languages that it has, with what ``{language}`` in ``config`` stands for; none if it is
            in one language, or in none.
        language: that of the samples, where the set has several.
        row_language: what the column ``lang`` has in the rows that are taken; rows of other languages are left out.
        trees: whether each row is a message that names the one before it, and conversations are to be made of them.
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
    size: str = ""
    languages: Mapping[str, str] = dataclasses.field(default_factory=dict)
    language: str = ""
    row_language: str = ""
    trees: bool = False

    @property
    def path(self) -> str:
        """Where the samples go, relative to the data folder."""
        language = f"-{self.language}" if self.language else ""
        return f"{self.kind}/{self.file or self.name}{language}.jsonl"

    def in_language(self, code: str) -> Source:
        """Returns the part of the set in a language; the set itself if it has one language only.

        Raises:
            UserError: if it has no such part.
        """
        if not self.languages:
            if code != ENGLISH and self.kind != "code":
                others = ", ".join(one.name for one in _TABLE if code in one.languages)
                hint = Translatable("for this language there are {names}", names=others)
                if not others:
                    hint = Translatable("leave --language out")
                raise UserError("{name} is in English; {hint}", name=self.name, hint=hint)
            return self
        if code not in self.languages:
            known = ", ".join(sorted(self.languages))
            raise UserError("{name} has no language {code!r}; it has {known}", name=self.name, code=code, known=known)
        own = self.languages[code]
        config = self.config and self.config.format(language=own)
        row_language = own if self.trees else ""
        return dataclasses.replace(self, config=config, language=code, row_language=row_language, languages={})


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
    Source("pile", "text", "monology/pile-uncopyrighted", None, "text", Translatable("as each work"),
           note="the Pile without its copyrighted parts; the first host, the-eye.eu, is gone"),
    Source("the-stack", "code", "bigcode/the-stack-dedup", None, "content", Translatable("as each file, permissive"),
           gated=True, data_dir="data/python", note="Python files of GitHub without near-duplicates"),
    Source("python", "code", "codeparrot/codeparrot-clean", None, "content", Translatable("as each file"), file="code",
           note="Python files of GitHub, cleaned"),
    Source("codesearchnet", "code", "code-search-net/code_search_net", "python", "whole_func_string",
           Translatable("as each file"),
           note="Python functions with docstrings; the first host, an S3 bucket, answers 403"),
    Source("alpaca", "instruct", "tatsu-lab/alpaca", None, None, "CC-BY-NC-4.0", note="52,000 instructions"),
    Source("sharegpt", "chat", "liyucheng/ShareGPT90K", None, None, "CC0-1.0",
           note="conversations with an assistant, shared by its users"),
    Source("ultrachat", "chat", "HuggingFaceH4/ultrachat_200k", None, None, "MIT", split="train_sft",
           note="conversations as `messages` with roles"),
    Source("wikipedia", "text", "wikimedia/wikipedia", "20231101.{language}", "text", "CC-BY-SA-3.0 and GFDL",
           languages=WIKIPEDIA_CODES, note="whole articles by --language", size="553 MB in Turkish"),
    Source("fineweb-2", "text", "HuggingFaceFW/fineweb-2", "{language}", "text", "ODC-BY",
           languages=FINEWEB_CODES, note="web pages by --language, cleaned for each; English is in fineweb-edu"),
    Source("fineweb-edu", "text", "HuggingFaceFW/fineweb-edu", "sample-10BT", "text", "ODC-BY",
           note="English web pages that teach something", size="10 billion tokens"),
    Source("cosmopedia", "text", "HuggingFaceTB/cosmopedia", "stanford", "text", "Apache-2.0",
           note="textbooks that Mixtral 8x7B wrote, by outlines of courses", size="1 million texts, 3.3 GB"),
    Source("dolly", "instruct", "databricks/databricks-dolly-15k", None, None, "CC-BY-SA-3.0",
           note="instructions and answers that people wrote", size="15,000 rows, 13 MB"),
    Source("smoltalk", "chat", "HuggingFaceTB/smoltalk", "all", None, "Apache-2.0",
           note="conversations as `messages` with roles, most of them made by models", size="1 million rows"),
    Source("oasst2", "chat", "OpenAssistant/oasst2", None, None, "Apache-2.0", trees=True, languages=OASST_CODES,
           note="conversations that people wrote and ranked, by --language", size="135,000 messages, 67 MB"),
)  # fmt: skip

SOURCES = {source.name: source for source in _TABLE}

DEFAULT_SOURCES = ("wikitext", "python")
"""What is downloaded if no source is named, in English."""

DEFAULT_TEXT = "wikipedia"
"""The source of text in other languages."""

_OTHER_NAMES = {
    "wikitext-103": "wikitext",
    "the-pile": "pile",
    "the_pile": "pile",
    "stack": "the-stack",
    "the_stack": "the-stack",
    "code": "python",
    "python-code": "python",
    "code_search_net": "codesearchnet",
    "fineweb2": "fineweb-2",
    "databricks-dolly-15k": "dolly",
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
            "  {name:14} text, code, questions and answers of this machine's own Python installation; no network",
            name=BUILTIN,
        )
    ]
    for source in _TABLE:
        line = Translatable("{id}, licence {licence}", id=source.hub_id, licence=Translatable(source.licence))
        about = [Translatable(one) for one in (source.note, source.size) if one]
        line = join_texts("; ", [*about, line])
        if source.gated:
            line = Translatable("{line}, gated: accept its terms there first and set HF_TOKEN", line=line)
        lines.append(Translatable("  {name:14} {kind}: {line}", name=source.name, kind=source.kind, line=line))
    return join_texts("\n", lines)
