"""Sets of documents to score: those that a run held out, or a user's own, compared with what the run trained on."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from mm_rec.data.documents.account import table_of
from mm_rec.data.documents.folder import find_documents
from mm_rec.data.documents.parsing import Parser
from mm_rec.data.documents.reading import Documents as Reader
from mm_rec.data.documents.reading import ReadOptions
from mm_rec.data.pack import Document, write_store
from mm_rec.data.prepared import Prepared, open_prepared
from mm_rec.errors import UserError
from mm_rec.evaluation.bits_per_byte import Documents, select_documents
from mm_rec.storage.lineage import DataFolder, run_of, trained_on
from mm_rec.text.tokenizer import Tokenizer
from mm_rec.translation import Translatable

__all__ = ["held_out", "open_training_data", "read_documents"]


def open_training_data(checkpoint: Path) -> list[Prepared]:
    """Returns the data that the weights of ``checkpoint`` were trained on; those of its own run come last.

    Raises:
        UserError: if they are not known, not there any more, or other data than then.
    """
    return [_open(place) for place in trained_on(checkpoint)]


def _open(place: DataFolder) -> Prepared:
    if not place.path.is_dir():
        raise UserError("the data in {path}, which the model was trained on, are not there any more", path=place.path)
    data = open_prepared(place.path)
    if data.documents_sha256 != place.sha256:
        raise UserError("the data in {path} are not those that the model was trained on", path=place.path)
    return data


def held_out(
    checkpoint: Path, tokenizer: Tokenizer, max_bytes: int | None = None
) -> tuple[dict[str, Documents], Prepared]:
    """Returns what the run of ``checkpoint`` held out, by domain, and the data that it is a part of.

    Args:
        checkpoint: a checkpoint in a run folder.
        tokenizer: that of the model.
        max_bytes: bytes to take of each domain; None takes what training validates on.

    Raises:
        UserError: if it is not known what the run trained on, or that is not there any more.
    """
    place = trained_on(checkpoint)[-1]
    data, found = _open(place), run_of(checkpoint)
    assert found is not None, "a checkpoint whose training data are known lies in a run folder"
    if data.tokenizer.sha256 != tokenizer.sha256:
        raise UserError("the data in {path} have another tokenizer than the model", path=place.path)
    most = found[1]["settings"]["valid_bytes"] if max_bytes is None else max_bytes
    chosen = {name: select_documents(store, tokenizer.token_sizes, most) for name, store in data.valid.items()}
    return {name: documents for name, documents in chosen.items() if documents.tokens}, data


def read_documents(
    path: Path, tokenizer: Tokenizer, max_bytes: int | None, skip_bad: int, tell: Callable[[str], None]
) -> Documents:
    """Returns the documents at ``path`` as tokens, of each no more than a part if there is a cap.

    Raises:
        UserError: if there are none, or more bad rows than may be left out.
    """
    found = find_documents(path)
    with tempfile.TemporaryDirectory() as folder, Parser(Path(folder)) as parser:
        reader = Reader(found.paths, parser, ReadOptions(skip_bad=skip_bad))
        texts = (document.text for document in reader.read() if document.text)
        documents = (Document([tokenizer.bos_id, *tokenizer.encode(text)], len(text.encode())) for text in texts)
        try:
            store = write_store(Path(folder) / "documents", documents, vocab_size=tokenizer.vocab_size)
        except ValueError as error:
            raise UserError("there are no documents in {path}", path=path) from error
        chosen = select_documents(store, tokenizer.token_sizes, max_bytes)
        del store  # whose folder can't be removed on Windows while it is open
    for line in table_of(str(path), found, reader):
        tell(line)
    if reader.bad_rows:
        tell(
            Translatable(
                "{path}: {count} bad rows left out, the first: {first}",
                path=path,
                count=len(reader.bad_rows),
                first=reader.bad_rows[0],
            )
        )
    if not chosen.tokens:
        raise UserError(
            "--max_bytes {max_bytes} leaves nothing of the documents in {path}", max_bytes=max_bytes, path=path
        )
    return chosen
