"""Which paragraphs of documents were seen in training."""

from pathlib import Path

import numpy as np
import pytest

from mm_rec.data.pack import Document, TokenStore, write_store
from mm_rec.evaluation.bits_per_byte import Documents, select_documents
from mm_rec.evaluation.seen_in_training import FEWEST_BYTES, compare, paragraphs
from mm_rec.text.tokenizer import Tokenizer, train_tokenizer

FIRST, SECOND, THIRD = (f"{word} paragraph is about {word.lower()} things, and about nothing else." for word in
                        ("One", "Another", "This third"))  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([FIRST, SECOND, THIRD] * 3, 300)


def documents(tokenizer: Tokenizer, *texts: str) -> Documents:
    tokens = [np.array([tokenizer.bos_id, *tokenizer.encode(text)]) for text in texts]
    return Documents(tokens, sum(len(text.encode()) for text in texts))


def store(path: Path, tokenizer: Tokenizer, *texts: str) -> TokenStore:
    made = (Document([tokenizer.bos_id, *tokenizer.encode(text)], len(text.encode())) for text in texts)
    return write_store(path, made, vocab_size=tokenizer.vocab_size)


def test_paragraphs_cover_the_text_and_white_space_does_not_count() -> None:
    text = f"{FIRST}\n \n\n{SECOND}\nshort\n\nshort".encode()
    found = list(paragraphs(text))
    assert [end for end, _ in found] == sorted({end for end, _ in found})
    assert found[-1] == (len(text), b"")
    assert found[0][1] == next(paragraphs(f"  {FIRST.replace(' ', '  ')}".encode()))[1] != b""
    assert not list(paragraphs(b""))
    assert next(paragraphs(b"x" * (FEWEST_BYTES - 1)))[1] == b""
    assert next(paragraphs(b"x" * FEWEST_BYTES))[1] != b""


def test_lines_without_empty_ones_are_cut_at_their_ends() -> None:
    lines = [f"{number}. {FIRST}\n" for number in range(50)]
    found = list(paragraphs("".join(lines).encode()))
    assert 5 < len(found) < 25
    assert [key for _, key in paragraphs("".join([*lines, THIRD]).encode())][: len(found) - 1] == [
        key for _, key in found
    ][:-1]


def test_what_training_has_seen_does_not_count_in_the_rest(tokenizer: Tokenizer, tmp_path: Path) -> None:
    training = [store(tmp_path / "train", tokenizer, f"{FIRST}\n\nand so on\n\n{THIRD}", "something else")]
    own = documents(tokenizer, f"{FIRST}\n\n{SECOND}\n\nshort", THIRD)
    seen = compare(own, training, tokenizer.token_bytes)
    assert (seen.n_paragraphs, seen.n_seen) == (3, 2)
    assert seen.describe() == "67% of its paragraphs (2 of 3) were seen in training"
    assert seen.rest is not None
    [tokens], [mask] = seen.rest.tokens, seen.rest.masks or []
    counted = b"".join(tokenizer.token_bytes[token] for token, one in zip(tokens, mask, strict=True) if one).decode()
    assert counted.strip() == SECOND
    assert seen.rest.n_bytes == len(counted.encode())


def test_all_or_nothing_leaves_no_rest(tokenizer: Tokenizer, tmp_path: Path) -> None:
    training = [store(tmp_path / "train", tokenizer, FIRST)]
    assert compare(documents(tokenizer, FIRST), training, tokenizer.token_bytes) == (1, 1, None)
    assert compare(documents(tokenizer, SECOND), training, tokenizer.token_bytes) == (1, 0, None)
    none = compare(documents(tokenizer, "short"), training, tokenizer.token_bytes)
    assert none == (0, 0, None)
    assert "no paragraph" in none.describe()


def test_messages_of_conversations_are_paragraphs(tokenizer: Tokenizer, tmp_path: Path) -> None:
    ids = [tokenizer.bos_id, *tokenizer.encode("a question"), tokenizer.end_id, *tokenizer.encode(FIRST)]
    training = [write_store(tmp_path / "train", [Document(ids, 9)], vocab_size=tokenizer.vocab_size)]
    assert compare(documents(tokenizer, FIRST), training, tokenizer.token_bytes).n_seen == 1


def test_the_last_paragraph_of_a_document_that_was_cut_is_not_compared(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = f"{FIRST}\n\n{SECOND}"
    own = store(tmp_path / "own", tokenizer, text)
    sizes = np.array([len(one) for one in tokenizer.token_bytes])
    whole = select_documents(own, sizes)
    part = select_documents(own, sizes, 8 * (len(text) - 5))
    assert (whole.cut, part.cut) == (frozenset(), {0})
    training = [store(tmp_path / "train", tokenizer, text)]
    assert compare(whole, training, tokenizer.token_bytes)[:2] == (2, 2)
    assert compare(part, training, tokenizer.token_bytes)[:2] == (1, 1)
