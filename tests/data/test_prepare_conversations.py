"""Conversations in token stores: every one in one split, loss masks, made once, fit for batches."""

import json
from pathlib import Path

import numpy as np
import pytest

from mm_rec.data.batches import Batches
from mm_rec.data.conversations import parse_conversation
from mm_rec.data.prepare_conversations import prepare_conversations
from mm_rec.data.prepared import Prepared
from mm_rec.errors import UserError
from mm_rec.text.conversation import encode_conversation
from mm_rec.text.tokenizer import Tokenizer, train_tokenizer

ROWS = [{"prompt": f"What is {i}?", "completion": f"It is {i * i} less {i}."} for i in range(60)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([json.dumps(ROWS)], 400)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS[:40]))
    (folder / "b.json").write_text(json.dumps(ROWS[20:]))  # 20 rows are in both files
    return folder


def run(data: Path, tokenizer: Tokenizer, **options: object) -> Prepared:
    return prepare_conversations(data, tokenizer, name="chat", cache=data.parent / "cache", **options)


def documents(prepared: Prepared, split: str) -> list[tuple[int, ...]]:
    store = getattr(prepared, split)["chat"]
    return [tuple(store.document(index).tolist()) for index in range(store.n_documents)]


def test_every_conversation_is_in_one_split(data: Path, tokenizer: Tokenizer) -> None:
    prepared = run(data, tokenizer)
    expected = [tuple(encode_conversation(tokenizer, parse_conversation(row))[0]) for row in ROWS[:40] + ROWS[20:]]
    train, valid = documents(prepared, "train"), documents(prepared, "valid")
    assert sorted(train + valid) == sorted(expected)
    assert set(train).isdisjoint(valid)
    assert 1 <= len(valid) < 20
    store = prepared.train["chat"]
    masks = [encode_conversation(tokenizer, parse_conversation(row))[1] for row in ROWS]
    by_ids = dict(zip(expected[:40] + expected[60:], masks, strict=True))
    assert store.loss_mask is not None
    assert store.loss_mask[:].tolist() == [counts for ids in train for counts in by_ids[ids]]


def test_it_is_made_once(data: Path, tokenizer: Tokenizer) -> None:
    told: list[str] = []
    first = run(data, tokenizer, progress=told.append)
    second = run(data, tokenizer, progress=told.append)
    assert (first.path, first.data_sha256) == (second.path, second.data_sha256)
    assert [line.split(";")[0] for line in told] == [
        "chat: reading a.jsonl, b.json", "chat: 80 conversations read", "chat: 80 conversations read"
    ]  # fmt: skip
    other = run(data, tokenizer, max_samples=50)
    assert other.data_sha256 != first.data_sha256
    assert len(documents(other, "train")) + len(documents(other, "valid")) == 50


def test_bad_rows_are_counted_and_capped(data: Path, tokenizer: Tokenizer) -> None:
    with (data / "a.jsonl").open("a") as file:
        file.write('\n{"text": "no conversation"}\n{"prompt": "a"')
    with pytest.raises(UserError, match=r"a\.jsonl:41: .*--skip_bad"):
        run(data, tokenizer)
    with pytest.raises(UserError, match=r"a\.jsonl:42: .*more than 1 bad rows"):
        run(data, tokenizer, skip_bad=1)
    told: list[str] = []
    prepared = run(data, tokenizer, skip_bad=2, progress=told.append)
    assert prepared.report["domains"]["chat"]["bad_rows"] == 2
    assert "80 conversations read, 2 bad rows left out" in told[-1]
    assert sum(line.startswith(f"left out {data / 'a.jsonl'}:") for line in told) == 2


def test_too_few_conversations_are_an_error(data: Path, tokenizer: Tokenizer) -> None:
    (data / "b.json").unlink()
    (data / "a.jsonl").write_text("\n".join([json.dumps(ROWS[0])] * 5))
    with pytest.raises(UserError, match="too few conversations"):
        run(data, tokenizer)


def test_batches_count_answers_only_and_start_afresh(data: Path, tokenizer: Tokenizer) -> None:
    prepared = run(data, tokenizer)
    batches = Batches(prepared.train, batch_size=2, seq_len=32, seed=1, layout="lanes", mixed=True)
    counted = 0
    for index in range(int(np.ceil(batches.tokens_per_epoch / 64)) + 1):
        batch = batches.micro_batch(index)
        assert batch.domain is None
        assert bool((batch.reset[batch.tokens == tokenizer.bos_id]).all())
        targets = batch.targets[batch.weight > 0]
        assert not set(targets.tolist()) & {tokenizer.bos_id, tokenizer.control_ids["<|user|>"]}
        counted += int((targets == tokenizer.end_id).sum())
    assert counted >= len(documents(prepared, "train"))
