"""Rows that train recall beside prepared data: made once for a share, and used again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from mm_rec.data.pack import Document, write_store
from mm_rec.data.prepared import Prepared, make_folder, open_folder
from mm_rec.data.recall_rows import LONGEST, recall_documents
from mm_rec.formats import KEY, VERSIONS
from mm_rec.storage.files import atomic_folder
from mm_rec.translation import Translatable

__all__ = ["add_recall_rows"]


def add_recall_rows(
    data: Prepared,
    share: float,
    *,
    longest: int = LONGEST,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Prepared:
    """Returns ``data`` with rows that train recall; without any if ``share`` is 0.

    They are made of the training documents alone and lie beside the folder of ``data``. Two processes may call this
    at once; the second waits.

    Args:
        data: the data of pre-training.
        share: the part of all training tokens that these rows are to be, from 0 to less than 1.
        longest: about the most tokens of a row.
        seed: of everything that is drawn.
        progress: takes a line about each thing that is done.

    Raises:
        UserError: if a file cannot be written or used.
    """
    if not share:
        return data
    tell = progress or (lambda line: None)
    made_of = {name: store.sha256 for name, store in sorted(data.train.items())}
    settings = {KEY: VERSIONS["recall rows"], "made of": made_of, "recall_share": share, "seed": seed}
    settings["longest"] = longest
    settings["tokenizer"] = data.tokenizer.sha256

    def make(path: Path) -> None:
        tokens = {name: round(store.n_tokens * share / (1 - share)) for name, store in data.train.items()}
        with atomic_folder(path, 16 * sum(tokens.values())) as folder:
            entries: dict[str, Any] = {}
            for name, store in data.train.items():
                tell(Translatable("{name}: writing rows that train recall", name=name))
                documents = recall_documents(store, data.tokenizer, name, tokens[name], seed, longest)
                entries[name] = _write(folder / f"{name}-recall", documents, data.tokenizer.vocab_size)
            report = {"recall_share": share, "longest": longest, "seed": seed, "made_of": made_of, "domains": entries}
            report |= {"tokenizer": data.tokenizer.sha256, "vocab_size": data.tokenizer.vocab_size}
            (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8", newline="\n")

    stores = open_folder(make_folder(data.path.parent, settings, make, tell)).stores
    recall = {name: stores[f"{name}-recall"] for name in data.train}
    hashes = [data.data_sha256, *([name, store.sha256] for name, store in sorted(recall.items()))]
    data_sha256 = hashlib.sha256(json.dumps(hashes).encode()).hexdigest()
    return dataclasses.replace(data, recall=recall, data_sha256=data_sha256)


def _write(path: Path, documents: Iterable[Document], vocab_size: int) -> dict[str, int]:
    """Writes a store and returns its counts; it is closed again, since its folder can't be renamed while it is open."""
    made = write_store(path, documents, vocab_size=vocab_size)
    assert made.loss_mask is not None
    return {"documents": made.n_documents, "tokens": made.n_tokens, "counted_tokens": made.loss_mask.sum()}
