import json

import numpy as np
import pytest

from mm_rec.data.pack import Document, TokenStore, file_sha256, write_store
from mm_rec.errors import UserError

DOCUMENTS = [Document([0, 5, 6, 7], 9), Document([0, 8], 1), Document([0, 9, 9], 4)]


def test_what_was_written_is_read(tmp_path):
    written = write_store(tmp_path / "store", DOCUMENTS, vocab_size=300)
    read = TokenStore.open(tmp_path / "store")
    assert read.tokens[:].tolist() == [0, 5, 6, 7, 0, 8, 0, 9, 9]
    assert read.tokens.dtype == np.uint16
    assert read.offsets.tolist() == [0, 4, 6, 9]
    assert read.n_bytes.tolist() == [9, 1, 4]
    assert read.loss_mask is None
    assert [read.document(i).tolist() for i in range(3)] == [list(document.tokens) for document in DOCUMENTS]
    assert (read.n_documents, read.n_tokens, read.sha256) == (3, 9, written.sha256)


def test_ids_beyond_two_bytes_take_four(tmp_path):
    read = write_store(tmp_path / "store", [Document([0, 70_000], 3)], vocab_size=70_001)
    assert read.tokens[:].tolist() == [0, 70_000]
    assert read.tokens.dtype == np.uint32


def test_a_loss_mask_is_kept_beside_the_tokens(tmp_path):
    documents = [Document([0, 5, 6], 2, [0, 0, 1]), Document([0, 7], 1, [0, 1])]
    read = write_store(tmp_path / "store", documents, vocab_size=300)
    assert read.loss_mask is not None
    assert read.loss_mask[:].tolist() == [0, 0, 1, 0, 1]


def test_the_hash_depends_on_tokens_and_on_where_documents_start(tmp_path):
    hashes = {
        write_store(tmp_path / str(i), documents, vocab_size=300).sha256
        for i, documents in enumerate(
            [DOCUMENTS, DOCUMENTS[::-1], [Document([0, 5, 6, 7, 0, 8], 10), DOCUMENTS[2]], DOCUMENTS]
        )
    }
    assert len(hashes) == 3


@pytest.mark.parametrize(
    "documents",
    [[], [Document([], 0)], [Document([0, 300], 1)], [Document([0, -1], 1)], [Document([0, 1], 1, [1])],
     [Document([0, 1], 1, [0, 1]), Document([0, 1], 1)]],
)  # fmt: skip
def test_documents_that_no_store_can_hold(tmp_path, documents):
    with pytest.raises(ValueError, match="document"):
        write_store(tmp_path / "store", documents, vocab_size=300)


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.npy", "n_bytes.npy", "index.json"])
@pytest.mark.parametrize("damage", ["missing", "cut", "longer", "empty"])
def test_damage_is_seen_at_once(tmp_path, name, damage):
    path = tmp_path / "store"
    write_store(path, DOCUMENTS, vocab_size=300)
    content = (path / name).read_bytes()
    if damage == "missing":
        (path / name).unlink()
    else:
        (path / name).write_bytes({"cut": content[:-2], "longer": content + b"xx", "empty": b""}[damage])
    with pytest.raises(UserError, match=name):
        TokenStore.open(path)


@pytest.mark.parametrize("content", ["[]", "null", "{}", '{"format": 1, "files": 3}', "\x00", "[" * 9999])
def test_an_index_of_another_shape_is_refused(tmp_path, content):
    path = tmp_path / "store"
    write_store(path, DOCUMENTS, vocab_size=300)
    (path / "index.json").write_text(content)
    with pytest.raises(UserError, match=r"the token store .* cannot be used"):
        TokenStore.open(path)


def test_tokens_of_another_type_are_refused(tmp_path):
    path = tmp_path / "store"
    write_store(path, DOCUMENTS, vocab_size=300)
    index = (path / "index.json").read_text()
    assert '"uint16"' in index
    (path / "index.json").write_text(index.replace('"uint16"', '"float16"'))
    with pytest.raises(UserError, match=r"the token store .* cannot be used"):
        TokenStore.open(path)


@pytest.mark.parametrize("name", ["tokens.bin", "loss_mask.bin", "offsets.npy", "n_bytes.npy"])
def test_a_flipped_bit_is_seen(tmp_path, name):
    path = tmp_path / "store"
    write_store(path, [Document([0, 5, 6], 2, [0, 1, 1]), Document([0, 7], 1, [0, 1])], vocab_size=300)
    content = bytearray((path / name).read_bytes())
    content[-1] ^= 1
    (path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} does not match its SHA-256"):
        TokenStore.open(path)


def seal_again(path):
    """Make the index of a store fit its files, as whoever forges them would."""
    index = json.loads((path / "index.json").read_text())
    for name, entry in index["files"].items():
        entry |= {"bytes": (path / name).stat().st_size, "sha256": file_sha256(path / name)}
    (path / "index.json").write_text(json.dumps(index))


def test_an_id_beyond_the_vocabulary_is_refused(tmp_path):
    path = tmp_path / "store"
    write_store(path, DOCUMENTS, vocab_size=300)
    TokenStore.open(path, vocab_size=10)
    with pytest.raises(UserError, match="it has the token id 9, and the vocabulary has 9"):
        TokenStore.open(path, vocab_size=9)


@pytest.mark.parametrize("offsets", [[0, 4, 3, 9], [1, 4, 6, 9], [0, 4, 6, 8], [0, 0, 6, 9], [0, 9], [], [[0, 9]]])
def test_offsets_that_are_none_are_refused(tmp_path, offsets):
    path = tmp_path / "store"
    write_store(path, DOCUMENTS, vocab_size=300)
    np.save(path / "offsets.npy", np.array(offsets, dtype=np.int64))
    seal_again(path)
    with pytest.raises(UserError, match=r"the token store .* cannot be used"):
        TokenStore.open(path)


def test_numbers_of_another_type_are_refused(tmp_path):
    path = tmp_path / "store"
    write_store(path, DOCUMENTS, vocab_size=300)
    np.save(path / "n_bytes.npy", np.array([1.0, 2.0, 3.0]))
    seal_again(path)
    with pytest.raises(UserError, match=r"n_bytes\.npy does not hold a row of int64"):
        TokenStore.open(path)


def test_the_index_states_what_the_store_holds(tmp_path):
    write_store(tmp_path / "store", DOCUMENTS, vocab_size=300)
    index = json.loads((tmp_path / "store" / "index.json").read_text())
    assert (index["tokens"], index["documents"], index["bytes"], index["dtype"]) == (9, 3, 14, "uint16")
