"""Batches against a slow, plain statement of what they have to be."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_rec.data.batches import Batches, EvenBatches
from mm_rec.data.pack import TokenStore

LAYOUTS = ["windows", "lanes"]
PROPERTY = settings(deadline=None, max_examples=60, derandomize=True)
lengths = st.lists(st.integers(1, 40), min_size=1, max_size=12)
sizes = st.tuples(st.integers(1, 5), st.integers(1, 17))


def store(lengths, first=1, mask=None):
    """Documents of given lengths; BOS is 0 and each other token occurs once, so that tokens tell their place."""
    tokens = np.arange(first, first + sum(lengths), dtype=np.uint16)
    offsets = np.cumsum([0, *lengths])
    tokens[offsets[:-1]] = 0
    return TokenStore(None, tokens, offsets, np.array(lengths), mask, "")


def same(a, b):
    return a.domain == b.domain and all(
        torch.equal(getattr(a, name), getattr(b, name)) for name in ("tokens", "targets", "weight", "reset")
    )


def whole_epochs(batches):
    """The fewest micro-batches of a single stream that end with an epoch, and how many epochs they are."""
    read = []
    while True:
        read.append(batches.micro_batch(len(read)))
        (epochs,) = batches.epochs(len(read)).values()
        if abs(epochs - round(epochs)) < 1e-9:
            return read, round(epochs)


@PROPERTY
@given(lengths, lengths, sizes, st.sampled_from(LAYOUTS), st.booleans(), st.integers(0, 2**63), st.data())
def test_a_batch_depends_on_nothing_but_construction_and_index(text, code, size, layout, mixed, seed, data):
    def make():
        stores = {"text": store(text), "code": store(code, 1000)}
        return Batches(stores, batch_size=size[0], seq_len=size[1], seed=seed, layout=layout, mixed=mixed)

    indices = data.draw(st.lists(st.integers(0, 10**6) | st.integers(0, 20), min_size=1, max_size=6))
    used = make()
    for index in indices:
        assert same(used.micro_batch(index), make().micro_batch(index))
    reordered = {"code": store(code, 1000), "text": store(text)}
    again = Batches(reordered, batch_size=size[0], seq_len=size[1], seed=seed, layout=layout, mixed=mixed)
    assert same(used.micro_batch(indices[0]), again.micro_batch(indices[0]))


@PROPERTY
@given(lengths, sizes, st.sampled_from(LAYOUTS), st.none() | st.integers(1, 50))
def test_every_token_but_bos_is_a_target_once_per_epoch(lengths, size, layout, limit):
    limit = limit if layout == "lanes" else None
    one = store(lengths)
    batches = Batches(
        {"text": one}, batch_size=size[0], seq_len=size[1], seed=3, layout=layout, document_limit=limit
    )  # fmt: skip
    read, epochs = whole_epochs(batches)
    targets = Counter(token for batch in read for token in batch.targets[batch.weight > 0].tolist())
    assert targets == {int(token): epochs for token in one.tokens if token}


@PROPERTY
@given(lengths, sizes, st.sampled_from(LAYOUTS))
def test_a_counted_target_is_the_next_token_of_the_same_document(lengths, size, layout):
    one = store(lengths)
    following = {int(a): int(b) for a, b in zip(one.tokens[:-1], one.tokens[1:], strict=True) if a and b}
    heads = {int(one.tokens[start + 1]) for start, n in zip(one.offsets[:-1], lengths, strict=True) if n > 1}
    batches = Batches({"text": one}, batch_size=size[0], seq_len=size[1], seed=3, layout=layout)
    for index in range(5):
        batch = batches.micro_batch(index)
        for token, target in zip(
            batch.tokens[batch.weight > 0].tolist(), batch.targets[batch.weight > 0].tolist(), strict=True
        ):
            assert target in heads if token == 0 else target == following[token]
        counted = int((batch.weight > 0).sum())
        assert batch.weight.sum().item() == pytest.approx(1 if counted else 0, abs=1e-5)


@PROPERTY
@given(lengths, sizes)
def test_windows_reset_at_row_starts_and_document_starts_only(lengths, size):
    batches = Batches({"text": store(lengths)}, batch_size=size[0], seq_len=size[1], seed=3, layout="windows")
    for index in range(5):
        batch = batches.micro_batch(index)
        expected = batch.tokens == 0
        expected[:, 0] = True
        assert torch.equal(batch.reset, expected)


@PROPERTY
@given(lengths, sizes, st.none() | st.integers(1, 50))
def test_lanes_continue_from_batch_to_batch_and_reset_at_piece_starts_only(lengths, size, limit):
    one = store(lengths)
    batches = Batches({"text": one}, batch_size=size[0], seq_len=size[1], seed=3, layout="lanes", document_limit=limit)
    read, _ = whole_epochs(batches)
    lanes = {name: torch.cat([getattr(batch, name) for batch in read], 1) for name in ("tokens", "reset", "weight")}
    place = {int(token): i for i, token in enumerate(one.tokens) if token}
    pieces = {start + i for start, n in zip(one.offsets[:-1], lengths, strict=True) for i in range(0, n, limit or n)}
    for tokens, reset in zip(lanes["tokens"].tolist(), lanes["reset"].tolist(), strict=True):
        assert reset[0]
        for i in range(1, len(tokens)):
            if tokens[i] == 0:
                assert reset[i]
            elif reset[i]:
                assert place[tokens[i]] in pieces
            elif tokens[i - 1]:
                assert tokens[i] in (tokens[i - 1] + 1, tokens[i - 1]), "a lane jumps without a reset"


def test_lanes_cut_every_document_at_the_limit():
    one = store([10])
    batches = Batches({"text": one}, batch_size=1, seq_len=10, seed=0, layout="lanes", document_limit=4)
    batch = batches.micro_batch(0)
    pieces = [piece.tolist() for piece in torch.tensor_split(batch.tokens[0], batch.reset[0].nonzero()[1:, 0])]
    assert sorted(pieces) == [[0, 2, 3, 4], [5, 6, 7, 8], [9, 10]]
    assert (batch.weight > 0).sum() == 9  # the last token of a piece still predicts the next one of its document


@PROPERTY
@given(st.lists(lengths, min_size=1, max_size=4), st.sampled_from(LAYOUTS))
def test_domains_take_turns_in_proportion_to_their_tokens(domains, layout):
    stores = {f"d{i}": store(one) for i, one in enumerate(domains)}
    batches = Batches(stores, batch_size=2, seq_len=4, seed=0, layout=layout)
    total = sum(one.n_tokens for one in stores.values())
    turns = Counter()
    for index in range(60):
        for name, one in stores.items():
            assert abs(turns[name] - index * one.n_tokens / total) <= len(stores)
            fresh = Batches({name: one}, batch_size=2, seq_len=4, seed=0, layout=layout)
            assert batches.epochs(index)[name] == fresh.epochs(turns[name])[name]
        batch = batches.micro_batch(index)
        alone = Batches({batch.domain: stores[batch.domain]}, batch_size=2, seq_len=4, seed=0, layout=layout)
        assert same(batch, alone.micro_batch(turns[batch.domain]))
        turns[batch.domain] += 1


@PROPERTY
@given(lengths, lengths, st.sampled_from(LAYOUTS))
def test_mixed_batches_read_each_token_of_all_domains_once_per_epoch(text, code, layout):
    stores = {"text": store(text), "code": store(code, 1000)}
    read, epochs = whole_epochs(Batches(stores, batch_size=3, seq_len=5, seed=1, layout=layout, mixed=True))
    targets = Counter(token for batch in read for token in batch.targets[batch.weight > 0].tolist())
    assert all(batch.domain is None for batch in read)
    assert targets == {int(token): epochs for one in stores.values() for token in one.tokens if token}


@PROPERTY
@given(lengths, lengths, st.booleans())
def test_further_documents_are_read_with_the_others_and_never_cut(text, more, mixed):
    masked = np.arange(sum(more)) % 3 == 0
    further = store(more, 1000, mask=masked.astype(np.uint8))
    total = sum(text) + sum(more)
    batches = Batches(
        {"text": store(text)}, batch_size=1, seq_len=total, seed=1, layout="lanes", mixed=mixed, document_limit=5,
        more={"text": further},
    )  # fmt: skip
    assert batches.tokens_per_epoch == total
    batch = batches.micro_batch(0)
    pieces = [piece.tolist() for piece in torch.tensor_split(batch.tokens[0], batch.reset[0].nonzero()[1:, 0])]
    documents = [further.document(index).tolist() for index in range(further.n_documents)]
    whole = [piece for piece in pieces if piece[-1] >= 1000]
    assert sorted(whole) == sorted(document for document in documents if len(document) > 1)
    assert all(len(piece) <= 5 for piece in pieces if piece[-1] < 1000)
    counted = batch.targets[batch.weight > 0].tolist()
    expected = [int(token) for token, counts in zip(further.tokens, masked, strict=True) if token and counts]
    assert sorted(target for target in counted if target >= 1000) == expected


def test_rows_of_mixed_batches_come_from_both_domains():
    stores = {"text": store([50] * 20), "code": store([50] * 20, 10_000)}
    for layout in LAYOUTS:
        batches = Batches(stores, batch_size=8, seq_len=25, seed=1, layout=layout, mixed=True)
        rows = batches.micro_batch(0).tokens.max(dim=1).values
        assert (rows < 10_000).any()
        assert (rows > 10_000).any()


def test_epochs_and_seeds_differ():
    one = {"text": store([30] * 30)}

    def first_rows(seed, start):
        batches = Batches(one, batch_size=1, seq_len=30, seed=seed, layout="windows")
        return [tuple(batches.micro_batch(start + i).tokens[0].tolist()) for i in range(30)]

    assert len(set(first_rows(0, 0) + first_rows(0, 30) + first_rows(1, 0))) > 80


def test_a_loss_mask_chooses_the_targets():
    mask = np.array([0, 0, 1, 1, 0, 0, 1], np.uint8)
    for layout in LAYOUTS:
        batch = Batches({"chat": store([4, 3], mask=mask)}, batch_size=1, seq_len=7, seed=0, layout=layout).micro_batch(
            0
        )
        assert sorted(batch.targets[batch.weight > 0].tolist()) == [3, 4, 7]
        assert batch.weight.max() == pytest.approx(1 / 3)


def test_a_batch_without_a_target_weighs_nothing():
    batch = Batches({"text": store([1, 1])}, batch_size=1, seq_len=4, seed=0, layout="windows").micro_batch(0)
    assert batch.weight.tolist() == [[0, 0, 0, 0]]


def test_types_and_shapes():
    batches = Batches({"text": store([9, 9])}, batch_size=2, seq_len=4, seed=0, layout="windows")
    batch = batches.micro_batch(0)
    assert [(x.dtype, x.shape) for x in (batch.tokens, batch.targets, batch.weight, batch.reset)] == [
        (dtype, (2, 4)) for dtype in (torch.int64, torch.int64, torch.float32, torch.bool)
    ]
    assert (batch.domain, batches.tokens_per_epoch) == ("text", 18)


@pytest.mark.parametrize(
    "changes",
    [{"stores": {}}, {"batch_size": 0}, {"seq_len": 0}, {"layout": "rows"}, {"document_limit": 5},
     {"layout": "lanes", "document_limit": 0}],
)  # fmt: skip
def test_wrong_arguments(changes):
    arguments = {
        "stores": {"text": store([5])},
        "batch_size": 1,
        "seq_len": 2,
        "seed": 0,
        "layout": "windows",
        **changes,
    }
    with pytest.raises(ValueError, match=r"must|need"):
        Batches(arguments.pop("stores"), **arguments)


@PROPERTY
@given(lengths, lengths, sizes, st.integers(0, 2**63), st.integers(0, 10**6))
def test_even_batches_take_the_domains_in_turn(text, code, size, seed, index):
    stores = {"text": store(text), "code": store(code, 1000)}
    n_rows, length = size
    batch = EvenBatches(stores, batch_size=n_rows, seq_len=length, seed=seed).micro_batch(index)
    assert batch.domain is None
    for row in range(n_rows):
        number = index * n_rows + row
        name = ("code", "text")[number % 2]
        alone = Batches({name: stores[name]}, batch_size=1, seq_len=length, seed=seed, layout="windows")
        one = alone.micro_batch(number // 2)
        assert torch.equal(batch.tokens[row], one.tokens[0])
        assert torch.equal(batch.targets[row], one.targets[0])
        assert torch.equal(batch.reset[row], one.reset[0])
        assert torch.allclose(batch.weight[row] * n_rows, one.weight[0])
