import math
from pathlib import Path

import numpy as np
import pytest
import torch

from mm_rec.config import ModelConfig
from mm_rec.data.pack import Document, TokenStore, write_store
from mm_rec.evaluation.bits_per_byte import (
    Documents,
    bytes_by_position,
    evaluate,
    position_bounds,
    select_documents,
)
from mm_rec.model import MMRecModel
from mm_rec.state import map_state

CONFIG = ModelConfig(vocab_size=64, d_model=32, n_heads=2, n_layers=3, d_ff=32, window=16, kept_pairs=6)


def documents(lengths: list[int], seed: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [np.concatenate([[0], random.integers(7, 64, size=length)]) for length in lengths]


@pytest.fixture(scope="module")
def model() -> MMRecModel:
    return MMRecModel(CONFIG)


@pytest.mark.parametrize("domain", ["text", "code", None])
def test_bits_are_those_of_each_document_read_alone(model: MMRecModel, domain: str | None) -> None:
    tokens = documents([3, 700, 41, 1, 530, 90])
    score = evaluate(model, Documents(tokens, n_bytes=1000), domain)
    nats = 0.0
    for one in tokens:
        ids = torch.from_numpy(one)[None]
        with torch.no_grad():
            logits, _ = model(ids[:, :-1], None, domain)
        nats += float(torch.nn.functional.cross_entropy(logits[0], ids[0, 1:], reduction="sum"))
    assert score.bits == pytest.approx(nats / math.log(2), rel=1e-5)
    assert score.bits_per_byte == score.bits / 1000
    assert (score.n_documents, score.n_tokens) == (6, 3 + 700 + 41 + 1 + 530 + 90)


def test_bits_and_bytes_by_position_are_those_of_the_tokens_there(model: MMRecModel) -> None:
    tokens = documents([700, 63, 64, 300])
    masks = [np.arange(len(one)) % 3 != 1 for one in tokens]
    chosen = Documents(tokens, 1, [mask.astype(np.uint8) for mask in masks])
    read: list[int] = []
    score = evaluate(model, chosen, "text", progress=read.append)
    bits, sizes = np.zeros(5), np.zeros(5, dtype=int)
    for one, mask in zip(tokens, masks, strict=True):
        ids = torch.from_numpy(one)[None]
        with torch.no_grad():
            logits, _ = model(ids[:, :-1], None, "text")
        nats = torch.nn.functional.cross_entropy(logits[0], ids[0, 1:], reduction="none").numpy()
        for place in range(1, len(one)):
            index = next(i for i, bound in enumerate(position_bounds(5)[1:]) if place < bound)
            bits[index] += mask[place] * nats[place - 1] / math.log(2)
            sizes[index] += mask[place] * TOKEN_BYTES[one[place]]
    assert score.bits_by_position == pytest.approx(bits, rel=1e-4)
    assert sum(score.bits_by_position) == pytest.approx(score.bits)
    assert bytes_by_position(chosen, TOKEN_BYTES) == sizes.tolist()
    assert sum(read) >= 700 + 63 + 64 + 300


def test_what_is_carried_on_can_be_changed(model: MMRecModel) -> None:
    tokens = documents([1300])
    chosen = Documents(tokens, 1)
    usual, emptied = (
        evaluate(model, chosen, "text", carry=carry).bits_by_position
        for carry in (lambda state: state, lambda state: map_state(state, torch.zeros_like))
    )
    assert usual[:4] == emptied[:4]  # up to place 512, the end of the first piece
    assert usual[4] != emptied[4]
    pieces = [documents([1300])[0][start : start + 513] for start in (0, 512, 1024)]
    alone = sum(evaluate(model, Documents([piece], 1), "text").bits for piece in pieces)
    assert sum(emptied) == pytest.approx(alone, rel=1e-6)


def test_result_does_not_depend_on_the_order_of_documents(model: MMRecModel) -> None:
    tokens = documents([30, 600, 5, 64, 12])
    forward = evaluate(model, Documents(tokens, 1), "text")
    backward = evaluate(model, Documents(tokens[::-1], 1), "text")
    assert forward.bits == pytest.approx(backward.bits, rel=1e-6)


@pytest.fixture
def store(tmp_path) -> TokenStore:
    # A token stands for (id % 4 + 1) bytes, BOS for none.
    tokens = documents([5, 400, 20, 300, 8, 90], seed=1)
    rows = [Document(list(one), int((one[1:] % 4 + 1).sum())) for one in tokens]
    return write_store(tmp_path / "store", rows, vocab_size=64)


TOKEN_BYTES = np.array([0, *(i % 4 + 1 for i in range(1, 64))])


def test_without_a_cap_every_document_is_whole(store: TokenStore) -> None:
    chosen = select_documents(store, TOKEN_BYTES)
    assert chosen.n_bytes == store.n_bytes.sum()
    assert [len(one) for one in chosen.tokens] == list(np.diff(store.offsets))


@pytest.mark.parametrize("cap", [1, 7, 64, 500, 100_000])
def test_a_cap_holds_and_counts_the_bytes_of_what_is_kept(store: TokenStore, cap: int) -> None:
    chosen = select_documents(store, TOKEN_BYTES, cap)
    assert chosen.n_bytes <= cap
    assert chosen.n_bytes == sum(int(TOKEN_BYTES[one].sum()) for one in chosen.tokens)
    for one in chosen.tokens:
        assert len(one) >= 2
        assert one[0] == 0
        assert TOKEN_BYTES[one].sum() <= max(cap // 8, 1)
    again = select_documents(store, TOKEN_BYTES, cap)
    assert all(np.array_equal(a, b) for a, b in zip(chosen.tokens, again.tokens, strict=True))


def test_only_what_the_mask_names_counts(model: MMRecModel, tmp_path: Path) -> None:
    tokens = documents([700, 41, 90], seed=2)
    masks = [(np.arange(len(one)) % 3 == 1).astype(np.uint8) for one in tokens]
    rows = [
        Document(list(one), int((TOKEN_BYTES[one] * mask).sum()), list(mask))
        for one, mask in zip(tokens, masks, strict=True)
    ]
    chosen = select_documents(write_store(tmp_path / "store", rows, vocab_size=64), TOKEN_BYTES)
    score = evaluate(model, chosen, None)
    nats = 0.0
    for one, mask in zip(tokens, masks, strict=True):
        ids = torch.from_numpy(one)[None]
        with torch.no_grad():
            logits, _ = model(ids[:, :-1], None, None)
        nll = torch.nn.functional.cross_entropy(logits[0], ids[0, 1:], reduction="none")
        nats += float(nll[torch.from_numpy(mask[1:]) == 1].sum())
    assert score.bits == pytest.approx(nats / math.log(2), rel=1e-5)
    assert score.n_tokens == sum(int(mask.sum()) for mask in masks)
    capped = select_documents(write_store(tmp_path / "again", rows, vocab_size=64), TOKEN_BYTES, 80)
    assert capped.masks is not None
    counted = [int((TOKEN_BYTES[one] * mask).sum()) for one, mask in zip(capped.tokens, capped.masks, strict=True)]
    assert 0 < sum(counted) == capped.n_bytes <= 80


def test_interruption_comes_between_chunks(model: MMRecModel) -> None:
    calls = []

    def stop_at_third() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(model, Documents(documents([2000]), 1), "text", between=stop_at_third)
