"""From documents on disk to a tokenizer and token stores, made once and used again.

``data_dir/text`` and ``data_dir/code`` hold documents of any kind (:mod:`mm_rec.data.documents`), or other folders are
named for the domains. What is made of them lies in ``data_dir/prepared/HASH``, where HASH stands for the contents of
the files and all settings below, so that a folder is used again exactly if it would come out the same. Documents are
read three times, to filter and split them, to train the tokenizer and to write tokens, so that memory holds a few
kilobytes of each, not its text; what needs parsing is parsed once, and its text kept on the disk meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from mm_rec.config import DOMAINS
from mm_rec.data.documents.account import Account, count_kinds, read_account, relative, tell_account, write_account
from mm_rec.data.documents.parsing import Parser
from mm_rec.data.documents.reading import Documents, ReadOptions
from mm_rec.data.domain_files import choose_root, find_domains, find_named
from mm_rec.data.filters import count_reasons
from mm_rec.data.first_pass import Survey, survey_domain
from mm_rec.data.manifest import check_files, hash_files, require_unchanged
from mm_rec.data.origins import origins_of, write_origins
from mm_rec.data.pack import Document, write_store
from mm_rec.data.preparation_estimate import estimate_preparation
from mm_rec.data.prepared import Prepared, make_once, tell_bad_rows, write_report
from mm_rec.errors import UserError
from mm_rec.formats import KEY, VERSIONS
from mm_rec.storage.files import atomic_folder, format_bytes, some_names
from mm_rec.text.tokenizer import Tokenizer, train_tokenizer
from mm_rec.translation import Translatable

__all__ = ["PART", "describe", "prepare"]

_TOKENIZER_BYTES = 12_000_000  # of each domain; training a vocabulary of 32,000 on it takes some ten seconds
_USED_AGAIN = {5: 4}
"""By version of the format of documents, the one whose folders are used again: in 4 other documents are held out where
the first one is large."""
_LARGE_BYTES = 2_000_000_000  # take some seconds to hash
_SMALLEST_VOCABULARY = 512
_BYTES_AN_ENTRY = 1280  # of text for each entry of the vocabulary: rarer tokens cost time and learn little
PART = "part_of_a_document"
"""Key of a report's entry, there if what is held out is the end of a document that is trained on."""
_ENCODE_CHARACTERS = 2_000_000  # at a time


def prepare(
    data_dir: Path,
    vocab_size: int,
    *,
    max_samples: int | None = None,
    tokenizer: Tokenizer | None = None,
    filters: bool = True,
    options: ReadOptions | None = None,
    domains: Sequence[str] = DOMAINS,
    folders: Mapping[str, Path] | None = None,
    cache: Path | None = None,
    skip: Sequence[Path] = (),
    name_left_out: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Prepared:
    """Filter, split and tokenize documents, or open what an earlier call made of the same.

    Of each domain about 3% of the bytes, at most 256 KiB, are held out for validation: whole documents, chosen by
    the hash of their text, or, if all of them are larger than that, the end of one. Two processes may call this at
    once; the second waits.

    Args:
        data_dir: has a folder for each domain; or documents, which then are the first domain.
        vocab_size: upper bound for the tokenizer to train; little text makes it smaller, an entry per 1,280 bytes.
        max_samples: use the first so many documents of each domain that pass the filters.
        tokenizer: use this one instead of training one.
        filters: leave out documents of low quality and near-duplicates.
        options: how files are to be read; None for the usual way.
        domains: names of the folders.
        folders: a file or folder of documents for each domain, in place of those in ``data_dir``.
        cache: where the result goes if ``folders`` are given or ``data_dir`` cannot be written to.
        skip: files and folders that are no documents, as the program's own.
        name_left_out: tell the name of everything that is left out.
        progress: takes a line about each thing that is done.

    Raises:
        UserError: if there is no data, too little, or a file that cannot be used.
    """
    data_dir = Path(data_dir)
    tell = progress or (lambda line: None)
    options = options or ReadOptions()
    found = find_domains(data_dir, domains, skip, tell) if folders is None else find_named(folders, skip, tell)
    files = {name: one.found.paths for name, one in found.items()}
    root = choose_root(data_dir, cache, tell) if folders is None else cache or data_dir / "prepared"

    def announce() -> None:
        estimate = estimate_preparation(files, max_samples=max_samples, filters=filters, options=options)
        tell(estimate.describe())
        estimate.check(root)

    is_first = not any(root.glob("*/"))
    if is_first:
        announce()  # before the files are hashed, which takes long where they are large
    size = sum(path.stat().st_size for paths in files.values() for path in paths)
    if size > _LARGE_BYTES:
        tell(Translatable("hashing {size} of data files", size=format_bytes(size)))
    hash_them = check_files if folders is None else hash_files  # a manifest is that of downloads into a data folder
    hashes = {name: hash_them(one.home, one.found.paths) for name, one in found.items()}
    settings = {
        KEY: VERSIONS["documents"],
        "files": hashes,
        "tokenizer": vocab_size if tokenizer is None else tokenizer.sha256,
        "max_samples": max_samples,
        "filters": filters,
        "skip_bad": options.skip_bad,
    }
    if options.columns or any(kind.how != "rows" for one in found.values() for _, kind in one.found.files):
        settings["reading"] = [VERSIONS["document readers"], options.encoding, options.columns]

    def make(path: Path) -> None:
        if not is_first:
            announce()
        with Parser(root, options.encoding, options.columns) as parser:
            surveys = {}
            for name, paths in files.items():
                tell(
                    Translatable("{name}: reading {files}", name=name, files=some_names([file.name for file in paths]))
                )
                documents = Documents(paths, parser, options)
                try:
                    surveys[name] = survey_domain(name, documents, max_samples=max_samples, filters=filters, tell=tell)
                except UserError:
                    left_out = [*found[name].found.left_out, *documents.left_out.values()]
                    tell_account(name, Account(count_kinds(documents), left_out, []), name_left_out, tell)
                    raise
                tell_bad_rows(documents.bad_rows, tell)
            with atomic_folder(path, sum(survey.n_bytes for survey in surveys.values())) as folder:
                write_origins(folder, {name: origins_of(one.home, hashes[name]) for name, one in found.items()})
                write_account(folder, {name: _account(survey, found[name].home) for name, survey in surveys.items()})
                _make(folder, surveys, vocab_size, tokenizer, tell)
                for name, one in found.items():
                    require_unchanged(one.home, one.found.paths, hashes[name])

    used_again = _USED_AGAIN.get(VERSIONS["documents"])
    earlier = None if used_again is None else {**settings, KEY: used_again}
    prepared = make_once(root, settings, make, tell, earlier)
    noted = read_account(prepared.path)
    for name, one in found.items():
        account = noted.get(name, Account({}, [], []))
        unreadable = relative(one.found.left_out, one.home)
        tell_account(name, account._replace(files=[*unreadable, *account.files]), name_left_out, tell)
    for line in describe(prepared.report):
        tell(line)
    return prepared


def _account(survey: Survey, home: Path) -> Account:
    files = relative(survey.documents.left_out.values(), home)
    return Account(count_kinds(survey.documents), files, relative(survey.dropped_by_file(), home))


def describe(report: dict[str, Any]) -> list[Translatable]:
    """A report in words, a line a domain."""
    lines = []
    for name, entry in report["domains"].items():
        train, valid = entry["train"], entry["valid"]
        kept = Translatable("{read:,} documents read, {kept:,} kept", read=entry["read"], kept=entry["kept"])
        if entry["dropped"]:
            kept = Translatable("{kept} (left out: {dropped})", kept=kept, dropped=count_reasons(entry["dropped"]))
        lines.append(
            Translatable(
                "{name}: {kept}; {train:,} tokens to train on, {valid:,} to validate on, {each:.2f} bytes a token",
                name=name,
                kept=kept,
                train=train["tokens"],
                valid=valid["tokens"],
                each=train["bytes"] / train["tokens"],
            )
        )
        if valid.get(PART):
            lines.append(
                Translatable(
                    "{name}: no document is small enough to be held out whole, so validation reads the end of one "
                    "whose beginning is trained on; it says less about other texts, and more or shorter documents "
                    "mend that",
                    name=name,
                )
            )
    return lines


def _make(
    folder: Path,
    surveys: dict[str, Survey],
    vocab_size: int,
    tokenizer: Tokenizer | None,
    tell: Callable[[str], None],
) -> None:
    """Train the tokenizer and write everything into ``folder``."""
    if tokenizer is None:
        tell(Translatable("training the tokenizer"))
        samples = (survey.train_texts(_TOKENIZER_BYTES) for survey in surveys.values())
        most = sum(survey.n_bytes for survey in surveys.values()) // _BYTES_AN_ENTRY
        vocab_size = min(vocab_size, max(most, _SMALLEST_VOCABULARY))
        tokenizer = train_tokenizer(chain.from_iterable(samples), vocab_size)
    entries: dict[str, Any] = {}
    for name, survey in surveys.items():
        tell(Translatable("{name}: writing tokens", name=name))
        entry = entries[name] = {
            "read": survey.read,
            "bad_rows": len(survey.documents.bad_rows),
            "dropped": dict(survey.dropped.most_common()),
            "kept": len(survey.kept),
        }
        for split, texts in (("train", survey.train_texts()), ("valid", survey.valid_texts())):
            documents = _encode(tokenizer, texts)
            store = write_store(folder / f"{name}-{split}", documents, vocab_size=tokenizer.vocab_size)
            entry[split] = {
                "documents": store.n_documents,
                "tokens": store.n_tokens,
                "bytes": int(store.n_bytes.sum()),
            }
        if survey.cut is not None:
            entry["valid"][PART] = True
    write_report(folder, tokenizer, entries)


def _encode(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[Document]:
    """Documents as tokens, encoded on all cores some megabytes at a time."""
    batch: list[str] = []
    size = 0
    for text in chain(texts, [None]):
        if text is not None:
            batch.append(text)
            size += len(text)
        if text is None or size >= _ENCODE_CHARACTERS:
            for one, ids in zip(batch, tokenizer.encode_batch(batch), strict=True):
                yield Document([tokenizer.bos_id, *ids], len(one.encode()))
            batch, size = [], 0
