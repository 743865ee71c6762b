"""Rows that train recall: what counts was in the row before, the rest is the store's own text."""

import json
import random

import numpy as np
import pytest

from mm_rec.data.pack import Document, write_store
from mm_rec.data.prepare import prepare
from mm_rec.data.prepare_recall import add_recall_rows
from mm_rec.data.recall_rows import LONGEST, Part, _counted, recall_documents, recall_row
from mm_rec.data.synthetic import write_synthetic
from mm_rec.errors import UserError
from mm_rec.formats import VERSIONS


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_synthetic(folder, 150)
    return prepare(folder, 512, filters=False)


@pytest.mark.parametrize("domain", ["text", "code"])
def test_what_counts_is_text_of_the_store_or_was_in_the_row_before(data, domain):
    store, tokenizer = data.train[domain], data.tokenizer
    own = "\n".join(tokenizer.decode(store.document(index)) for index in range(store.n_documents))
    answers = said = 0
    for trial in range(40):
        parts = recall_row(random.Random(trial), store, tokenizer, domain, 3000)
        before = ""
        for text, counts, answers_it in parts:
            is_own = all(line.strip() in own for line in text.splitlines())
            if answers_it or (counts and not is_own):
                assert counts
                assert text in before
                answers += 1
            said += not counts and text.isdecimal()
            before += text
        assert len(before.encode()) >= 3000
    assert answers > 300
    assert said > 50


def test_most_rows_ask_for_few_things_far_away(data):
    """Such rows teach what is worth keeping; the others, with many things at all distances, how to find it."""
    store, tokenizer = data.train["text"], data.tokenizer
    few = []
    for trial in range(50):
        before, distances = "", []
        for text, _, answers in recall_row(random.Random(trial), store, tokenizer, "text", 12_000):
            if answers:
                distances.append(len(before) - before.rindex(text))
            before += text
        if len(distances) <= 8:
            few.append(distances)
    assert 25 <= len(few) <= 45
    assert (np.concatenate(few) >= 300).mean() > 0.6  # what was said may stand nearer, too, by chance


def test_a_token_counts_by_the_part_in_which_it_ends(data):
    parts = [
        Part("The clerk", False),
        Part(" sold", True),
        Part(" 12 ", False),
        Part("books.", True),
        Part("\n", False),
    ]
    ids = data.tokenizer.encode("".join(part.text for part in parts))
    texts = [data.tokenizer.token_bytes[i].decode() for i in ids]
    mask = _counted(parts, np.cumsum([len(text) for text in texts]))
    place = 0
    for text, counts in zip(texts, mask, strict=True):
        place += len(text)
        assert counts == (9 < place <= 14 or 18 < place <= 24)


def test_a_document_is_its_text_with_bos_and_mask(data):
    for document in recall_documents(data.train["text"], data.tokenizer, "text", 5000, 3):
        assert document.tokens[0] == data.tokenizer.bos_id
        assert document.loss_mask[0] == 0
        assert len(document.loss_mask) == len(document.tokens)
        assert set(document.loss_mask) == {0, 1}
        assert document.n_bytes == len(data.tokenizer.decode(document.tokens).encode())


@pytest.mark.parametrize("domain", ["text", "code"])
def test_a_text_of_one_word_has_rows_too(data, tmp_path, domain):
    tokenizer = data.tokenizer
    ids = tokenizer.encode("again\n" * 4000)
    store = write_store(
        tmp_path / "store", [Document([tokenizer.bos_id, *ids], 24_000)], vocab_size=tokenizer.vocab_size
    )
    made = list(recall_documents(store, tokenizer, domain, 40_000, 0))
    assert sum(len(document.tokens) for document in made) >= 40_000


def test_rows_depend_on_their_arguments_alone(data):
    def made(tokens, seed, domain="text"):
        return list(recall_documents(data.train[domain], data.tokenizer, domain, tokens, seed))

    first = made(3000, 0)
    assert 3000 <= sum(len(document.tokens) for document in first) < 6000
    assert made(3000, 0) == first
    assert made(1, 0) == made(2, 0)
    assert len(made(1, 0)) == 1
    assert made(3000, 1) != first
    assert len({tuple(document.tokens) for document in first}) == len(first)


def test_rows_are_about_as_long_as_they_may_be(data):
    def lengths(longest):
        return [
            len(one.tokens) for one in recall_documents(data.train["text"], data.tokenizer, "text", 60_000, 0, longest)
        ]

    short, long = lengths(256), lengths(LONGEST)
    assert max(short) < 800
    assert len(set(short)) > 30
    assert max(long) > 2000


def test_rows_are_added_once_for_a_share_and_seed(data):
    assert add_recall_rows(data, 0) is data
    told = []
    added = add_recall_rows(data, 0.2, progress=told.append)
    assert told == ["text: writing rows that train recall", "code: writing rows that train recall"]
    assert add_recall_rows(data, 0.2, progress=told.append).data_sha256 == added.data_sha256
    assert len(told) == 2
    for name, store in added.recall.items():
        share = store.n_tokens / (store.n_tokens + data.train[name].n_tokens)
        assert 0.2 <= share < 0.3
        assert added.train[name] is data.train[name]
    others = [add_recall_rows(data, 0.1), add_recall_rows(data, 0.2, seed=1), add_recall_rows(data, 0.2, longest=99)]
    assert len({one.data_sha256 for one in [data, added, *others]}) == 5
    path = added.recall["text"].path.parent
    report = json.loads((path / "report.json").read_text())
    assert (report["recall_share"], report["seed"]) == (0.2, 0)
    assert report["domains"]["text"]["tokens"] == added.recall["text"].n_tokens
    assert "report.json" in json.loads((path / "manifest.json").read_text())["files"]


def test_another_version_is_made_anew(data, monkeypatch):
    before = add_recall_rows(data, 0.2).recall["text"].path.parent
    monkeypatch.setitem(VERSIONS, "recall rows", VERSIONS["recall rows"] + 1)
    assert add_recall_rows(data, 0.2).recall["text"].path.parent != before


def test_rows_that_were_changed_are_not_trained_on(data):
    path = add_recall_rows(data, 0.3).recall["text"].path
    for name in ("tokens.bin", "loss_mask.bin", "offsets.npy", "index.json"):
        sound = (path / name).read_bytes()
        (path / name).write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
        with pytest.raises(UserError, match=r"text-recall.*the next run makes it anew"):
            add_recall_rows(data, 0.3)
        (path / name).write_bytes(sound)
