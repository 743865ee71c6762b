"""Rows that train recall: what counts was in the row before, the rest is the store's own text."""

import json

import pytest

from mm_rec.data.prepare import prepare
from mm_rec.data.prepare_recall import add_recall_rows
from mm_rec.data.recall_rows import LONGEST, recall_documents
from mm_rec.data.synthetic import write_synthetic
from mm_rec.errors import UserError
from mm_rec.formats import VERSIONS


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_synthetic(folder, 150)
    return prepare(folder, 512, filters=False)


def runs(tokenizer, document):
    """The text of the row in runs of equal mask: text, whether it counts."""
    found = []
    for token, counts in zip(document.tokens[1:], document.loss_mask[1:], strict=True):
        if not found or found[-1][1] != counts:
            found.append([b"", counts])
        found[-1][0] += tokenizer.token_bytes[token]
    return [(text.decode(), bool(counts)) for text, counts in found]


@pytest.mark.parametrize("domain", ["text", "code"])
def test_what_counts_is_text_of_the_store_or_was_in_the_row_before(data, domain):
    store, tokenizer = data.train[domain], data.tokenizer
    own = "\n".join(tokenizer.decode(store.document(index)) for index in range(store.n_documents))
    answers = 0
    documents = list(recall_documents(store, tokenizer, domain, 20_000, 3))
    for document in documents:
        assert document.tokens[0] == tokenizer.bos_id
        assert document.loss_mask[0] == 0
        text = tokenizer.decode(document.tokens)
        assert document.n_bytes == len(text.encode())
        before = ""
        for run, counts in runs(tokenizer, document):
            is_own = all(line.strip() in own for line in run.replace(". ", ".\n").split("\n"))
            if counts and not is_own:
                value = run.strip().strip("\"'=|:,()> ").removesuffix(".").splitlines()[0]
                assert value in before, (value, run)
                answers += 1
            before += run
    assert answers > 200
    total = sum(len(document.tokens) for document in documents)
    assert 20_000 <= total < 20_000 + LONGEST


def test_rows_depend_on_their_arguments_alone(data):
    def made(tokens, seed, domain="text"):
        return list(recall_documents(data.train[domain], data.tokenizer, domain, tokens, seed))

    first = made(3000, 0)
    assert made(3000, 0) == first
    assert made(1, 0) == made(2, 0)
    assert len(made(1, 0)) == 1
    assert made(3000, 1) != first
    assert len({tuple(document.tokens) for document in first}) == len(first)


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
    others = [add_recall_rows(data, 0.1), add_recall_rows(data, 0.2, seed=1)]
    assert len({one.data_sha256 for one in [data, added, *others]}) == 4
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
