"""From documents on disk to a tokenizer and token stores, made once and used again.

``data_dir/text`` and ``data_dir/code`` hold data files (:mod:`mm_rec.data.files`). What is made of them lies in
``data_dir/prepared/HASH``, where HASH stands for the contents of the files and all settings below, so that a folder
is used again exactly if it would come out the same. Documents are read three times, to filter and split them, to
train the tokenizer and to write tokens, so that memory holds a few kilobytes of each, not its text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from mm_rec.config import DOMAINS
from mm_rec.data.files import find_files
from mm_rec.data.first_pass import Survey, survey_domain
from mm_rec.data.manifest import check_files, require_unchanged
from mm_rec.data.pack import Document, write_store
from mm_rec.data.preparation_estimate import estimate_preparation
from mm_rec.data.prepared import Prepared, make_once, tell_bad_rows, write_report
from mm_rec.errors import UserError
from mm_rec.formats import KEY, VERSIONS
from mm_rec.storage.files import atomic_folder, format_bytes, some_names
from mm_rec.text.tokenizer import Tokenizer, train_tokenizer

__all__ = ["describe", "prepare"]

_TOKENIZER_BYTES = 12_000_000  # of each domain; training a vocabulary of 32,000 on it takes some ten seconds
_LARGE_BYTES = 2_000_000_000  # take some seconds to hash
_SMALLEST_VOCABULARY = 512
_BYTES_AN_ENTRY = 1280  # of text for each entry of the vocabulary: rarer tokens cost time and learn little
_ENCODE_CHARACTERS = 2_000_000  # at a time


def prepare(
    data_dir: Path,
    vocab_size: int,
    *,
    max_samples: int | None = None,
    tokenizer: Tokenizer | None = None,
    filters: bool = True,
    skip_bad: int = 0,
    domains: Sequence[str] = DOMAINS,
    progress: Callable[[str], None] | None = None,
) -> Prepared:
    """Filter, split and tokenize the data in ``data_dir``, or open what an earlier call made of the same.

    Of each domain about 3% of the bytes, at most 256 KiB, are held out for validation: whole documents, chosen by
    the hash of their text, or, if the first of them is larger than that, its end. Two processes may call this at
    once; the second waits.

    Args:
        data_dir: has a folder for each domain; or data files, which then are the first domain.
        vocab_size: upper bound for the tokenizer to train; little text makes it smaller, an entry per 1,280 bytes.
        max_samples: use the first so many documents of each domain that pass the filters.
        tokenizer: use this one instead of training one.
        filters: leave out documents of low quality and near-duplicates.
        skip_bad: leave out so many rows that cannot be read before giving up.
        domains: names of the folders.
        progress: takes a line about each thing that is done.

    Raises:
        UserError: if there is no data, too little, or a file that cannot be used.
    """
    data_dir = Path(data_dir)
    tell = progress or (lambda line: None)
    files = _find(data_dir, domains, tell)
    root = data_dir / "prepared"

    def announce() -> None:
        estimate = estimate_preparation(files, max_samples=max_samples, filters=filters)
        tell(estimate.describe())
        estimate.check(root)

    is_first = not any(root.glob("*/"))
    if is_first:
        announce()  # before the files are hashed, which takes long where they are large
    size = sum(path.stat().st_size for paths in files.values() for path in paths)
    if size > _LARGE_BYTES:
        tell(f"hashing {format_bytes(size)} of data files")
    hashes = {name: check_files(data_dir, paths) for name, paths in files.items()}
    settings = {
        KEY: VERSIONS["documents"],
        "files": hashes,
        "tokenizer": vocab_size if tokenizer is None else tokenizer.sha256,
        "max_samples": max_samples,
        "filters": filters,
        "skip_bad": skip_bad,
    }

    def make(path: Path) -> None:
        if not is_first:
            announce()
        surveys = {}
        for name, paths in files.items():
            tell(f"{name}: reading {some_names([file.name for file in paths])}")
            surveys[name] = survey_domain(name, paths, max_samples=max_samples, filters=filters, skip_bad=skip_bad)
            tell_bad_rows(surveys[name].bad_rows, tell)
        with atomic_folder(path, sum(survey.n_bytes for survey in surveys.values())) as folder:
            _make(folder, surveys, vocab_size, tokenizer, tell)
            for name, paths in files.items():
                require_unchanged(data_dir, paths, hashes[name])

    prepared = make_once(root, settings, make, tell)
    for line in describe(prepared.report):
        tell(line)
    return prepared


def describe(report: dict[str, Any]) -> list[str]:
    """A report in words, a line a domain."""
    lines = []
    for name, entry in report["domains"].items():
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in entry["dropped"].items())
        train, valid = entry["train"], entry["valid"]
        lines.append(
            f"{name}: {entry['read']:,} documents read, {entry['kept']:,} kept"
            + (f" (left out: {dropped})" if dropped else "")
            + f"; {train['tokens']:,} tokens to train on, {valid['tokens']:,} to validate on, "
            f"{train['bytes'] / train['tokens']:.2f} bytes a token"
        )
    return lines


def _find(data_dir: Path, domains: Sequence[str], tell: Callable[[str], None]) -> dict[str, list[Path]]:
    """The data files of each domain that has some."""
    if not data_dir.is_dir():
        raise UserError(f"there is no data folder {data_dir}; {_HOW_TO_GET_DATA.format(data_dir)}")
    found = {name: find_files(data_dir / name) for name in domains if (data_dir / name).is_dir()}
    found = {name: files for name, files in found.items() if files}
    loose = [file for file in find_files(data_dir) if file.parent == data_dir]
    if not found and loose:
        found = {domains[0]: loose}
    elif loose:
        names = some_names([file.name for file in loose])
        tell(f"not used, because they lie beside {' and '.join(found)}: {names}; move them into one of these folders")
    if not found:
        raise UserError(f"there is no data in {data_dir}; {_HOW_TO_GET_DATA.format(data_dir)}")
    return found


_HOW_TO_GET_DATA = (
    "get some with `python3 -m mm_rec.data.download_data --output_dir {}`, train with --download_data, put your own "
    "files into its folders text and code, or try --use_synthetic"
)


def _make(
    folder: Path,
    surveys: dict[str, Survey],
    vocab_size: int,
    tokenizer: Tokenizer | None,
    tell: Callable[[str], None],
) -> None:
    """Train the tokenizer and write everything into ``folder``."""
    if tokenizer is None:
        tell("training the tokenizer")
        samples = (survey.train_texts(_TOKENIZER_BYTES) for survey in surveys.values())
        most = sum(survey.n_bytes for survey in surveys.values()) // _BYTES_AN_ENTRY
        vocab_size = min(vocab_size, max(most, _SMALLEST_VOCABULARY))
        tokenizer = train_tokenizer(chain.from_iterable(samples), vocab_size)
    entries: dict[str, Any] = {}
    for name, survey in surveys.items():
        tell(f"{name}: writing tokens")
        entry = entries[name] = {
            "read": survey.read,
            "bad_rows": len(survey.bad_rows),
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
