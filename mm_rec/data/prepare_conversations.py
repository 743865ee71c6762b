"""From files of conversations to token stores with loss masks, made once and used again."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mm_rec.data.conversations import encode_document, find_conversations, read_conversations
from mm_rec.data.files import BadRows
from mm_rec.data.held_out import VALID_BYTES, VALID_SHARE, take_within
from mm_rec.data.manifest import check_files, require_unchanged
from mm_rec.data.origins import Origin, origins_of, write_origins
from mm_rec.data.pack import write_store
from mm_rec.data.prepared import Prepared, make_once, tell_bad_rows, write_report
from mm_rec.errors import UserError
from mm_rec.formats import KEY, VERSIONS
from mm_rec.storage.files import atomic_folder, some_names
from mm_rec.text.conversation import Message
from mm_rec.text.tokenizer import Tokenizer
from mm_rec.translation import Translatable

__all__ = ["prepare_conversations"]


def prepare_conversations(
    path: Path,
    tokenizer: Tokenizer,
    *,
    name: str,
    cache: Path,
    max_samples: int | None = None,
    skip_bad: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Prepared:
    """Split and tokenize the conversations at ``path``, or open what an earlier call made of the same.

    About 3% of the bytes, at most 256 KiB, are held out for validation: whole conversations, chosen by the hash of
    what is said in them, so that no conversation is in both splits, however often it is in the files.

    Args:
        path: a data file, or a folder of them.
        tokenizer: that of the model to be trained.
        name: of the one store in each split.
        cache: folder for what is made.
        max_samples: use the first so many conversations.
        skip_bad: leave out so many rows that are no conversations before giving up.
        progress: takes a line about each thing that is done.

    Raises:
        UserError: if there are no conversations, too few, or a file that cannot be used.
    """
    tell = progress or (lambda line: None)
    files, home = find_conversations(path), path if path.is_dir() else path.parent
    hashes = check_files(home, files)
    settings = {
        KEY: VERSIONS["conversations"],
        "conversations": name,
        "files": hashes,
        "tokenizer": tokenizer.sha256,
        "max_samples": max_samples,
        "skip_bad": skip_bad,
    }

    def make(folder: Path) -> None:
        tell(Translatable("{name}: reading {files}", name=name, files=some_names([file.name for file in files])))
        check = functools.partial(require_unchanged, home, files, hashes)
        origins = origins_of(home, hashes)
        _make(folder, name, files, tokenizer, max_samples, skip_bad, tell, check, origins)

    prepared = make_once(cache, settings, make, tell)
    tell(_describe(name, prepared.report["domains"][name]))
    return prepared


def _make(
    folder: Path,
    name: str,
    files: list[Path],
    tokenizer: Tokenizer,
    max_samples: int | None,
    skip_bad: int,
    tell: Callable[[str], None],
    check: Callable[[], None],
    origins: Sequence[Origin],
) -> None:
    """Read the files once to choose what is held out and once for each store; ``check`` that they stayed the same."""
    bad = BadRows(skip_bad)
    keys: list[bytes] = []
    sizes: dict[bytes, int] = {}
    for messages in _read(files, bad, max_samples):
        keys.append(_key(messages))
        sizes[keys[-1]] = sum(len(message.content.encode()) for message in messages)
    tell_bad_rows(bad.found, tell)
    held_out = _hold_out(sizes)
    if held_out is None:
        names = some_names(files)
        raise UserError(
            "there are too few conversations in {names}: training needs two different ones, and "
            "there are {count}, beside {bad} bad rows",
            names=names,
            count=len(sizes),
            bad=len(bad.found),
        )
    with atomic_folder(folder, 6 * sum(sizes.values())) as temporary:
        entry: dict[str, Any] = {"read": len(keys), "bad_rows": len(bad.found)}
        for split, is_valid in (("train", False), ("valid", True)):
            documents = (
                encode_document(tokenizer, messages)
                for messages in _read(files, BadRows(skip_bad), max_samples)
                if (_key(messages) in held_out) == is_valid
            )
            store = write_store(temporary / f"{name}-{split}", documents, vocab_size=tokenizer.vocab_size)
            assert store.loss_mask is not None
            entry[split] = {
                "documents": store.n_documents,
                "tokens": store.n_tokens,
                "answer_tokens": store.loss_mask.sum(),
            }
            del store  # Windows renames no folder in which a file is open
        write_report(temporary, tokenizer, {name: entry})
        write_origins(temporary, {name: origins})
        check()


def _read(files: list[Path], bad: BadRows, max_samples: int | None) -> Iterator[list[Message]]:
    count = 0
    for file in files:
        for messages in read_conversations(file, bad):
            yield messages
            count += 1
            if count == max_samples:
                return


def _key(messages: list[Message]) -> bytes:
    return hashlib.sha256(json.dumps(messages).encode()).digest()[:8]


def _hold_out(sizes: dict[bytes, int]) -> set[bytes] | None:
    """Which conversations are held out, by their keys; None if none would be left to train on."""
    budget = min(VALID_BYTES, VALID_SHARE * sum(sizes.values()))
    first, *others = sorted(sizes) or [b""]
    if not others:
        return None
    return {first, *take_within(others[:-1], sizes, budget - sizes[first])}


def _describe(name: str, entry: dict[str, Any]) -> Translatable:
    train, valid = entry["train"], entry["valid"]
    read = Translatable("{count:,} conversations read", count=entry["read"])
    if entry["bad_rows"]:
        read = Translatable("{read}, {count:,} bad rows left out", read=read, count=entry["bad_rows"])
    return Translatable(
        "{name}: {read}; {train:,} tokens to train on, {answers:,} of them in answers, and {valid:,} conversations to "
        "validate on",
        name=name,
        read=read,
        train=train["tokens"],
        answers=train["answer_tokens"],
        valid=valid["documents"],
    )
