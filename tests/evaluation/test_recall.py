"""Needles: the rows are what they say, the measure is right for models whose memory is known, the wordings are new."""

import ast
import itertools
import random
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mm_rec
from mm_rec.config import ModelConfig
from mm_rec.data import recall_wordings
from mm_rec.data.prepare import prepare
from mm_rec.data.recall_rows import recall_documents
from mm_rec.data.synthetic import synthetic_text, write_synthetic
from mm_rec.evaluation import recall
from mm_rec.evaluation.needle_templates import KINDS, NOISE, NeedleKind
from mm_rec.model import LossOutput, MMRecModel
from mm_rec.state import ModelState
from mm_rec.text.tokenizer import Tokenizer, train_tokenizer

CONFIG = ModelConfig(vocab_size=512, d_model=32, n_heads=2, n_layers=3, d_ff=48, window=16, kept_pairs=6)
TEXTS = synthetic_text(60)
BY_NAME = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    said = [text.format(key="Oslo", value="12345") for kind in KINDS for pair in kind.wordings for text in pair]
    return train_tokenizer(TEXTS + said * 3, 512)


@pytest.fixture(scope="module")
def haystack(tokenizer: Tokenizer) -> recall.Haystack:
    documents = [np.array([tokenizer.bos_id, *tokenizer.encode(text)]) for text in TEXTS]
    return recall.Haystack(documents, tokenizer)


def place_of(part: list[int], whole: list[int]) -> int:
    places = [at for at in range(len(whole)) if whole[at : at + len(part)] == part]
    assert len(places) == 1, "once"
    return places[0]


@pytest.mark.parametrize("distance", [600, 150])
@BY_NAME
def test_rows_hold_every_candidate_once_and_the_needle_at_its_distance(
    kind: NeedleKind, distance: int, tokenizer: Tokenizer, haystack: recall.Haystack
) -> None:
    make = recall._Maker(tokenizer, kind, haystack, distance)
    answers = set()
    for trial in range(12):
        row = make.row(random.Random(trial))
        text = tokenizer.decode(row.tokens)
        values = [tokenizer.decode(candidate).strip() for candidate in row.candidates]
        assert len(set(values)) == recall.CANDIDATES
        assert values[0] == row.answer
        assert all(len(re.findall(rf"\b{value}\b", text)) == 1 for value in values)
        assert len({len(value) for value in values}) <= 3
        if not kind.values:
            assert {len(candidate) for candidate in row.candidates} == {len(row.candidates[0])}
        keys = [key for key in kind.keys or ("",) if not key or key in text]
        assert len(keys) == kind.needles
        asked = [
            (statement.format(key=key, value=row.answer), question.format(key=key))
            for (statement, question), key in itertools.product(kind.wordings, keys)
        ]
        ((statement, question),) = [pair for pair in asked if pair[0] in text and pair[1] in text]
        assert text.endswith(question)
        needle = tokenizer.encode(" " + statement)
        begin = place_of(needle, row.tokens) + len(needle)
        assert len(row.tokens) - len(tokenizer.encode("\n\n" + question)) - begin == distance
        answers.add(row.answer)
    assert len(answers) > 6


def test_a_text_that_is_too_short_is_told(tokenizer: Tokenizer, haystack: recall.Haystack) -> None:
    length = len(haystack.tokens)
    assert haystack.holds(length - recall.BEFORE)
    assert not haystack.holds(length)
    assert {kind.name for kind, _ in recall.cells([10, length], None)} == {"pass key"}
    measured = recall.cells([10, length], haystack)
    assert [kind.name for kind, distance in measured if distance == length] == ["pass key"]
    assert {kind.name for kind, distance in measured if distance == 10} == {kind.name for kind in KINDS}
    with pytest.raises(ValueError, match="needs more than"):
        haystack.passage(random.Random(0), length + 1)


class Copier(nn.Module):
    """Sees ``reach`` tokens back, and says what came after the place there whose last tokens are most like its own.

    The state holds all tokens in the place of the position.
    """

    def __init__(self, reach: int) -> None:
        super().__init__()
        self.reach = reach
        self.embedding = nn.Embedding(1, 1)

    def initial_state(self, rows: int, domain: str | None) -> ModelState:
        return ModelState(torch.zeros(rows, 0, dtype=torch.int64), {})

    def features(self, tokens: Tensor, state: ModelState, domain: object, reset: object) -> tuple[None, ModelState]:
        return None, ModelState(torch.cat([state.position, tokens], dim=1), {})

    def forward(self, tokens: Tensor, state: ModelState, domain=None, reset=None, *, targets=None, weight=None):
        before = state.position.shape[1]
        seen = torch.cat([state.position, tokens], dim=1)
        logits = torch.zeros(*tokens.shape, CONFIG.vocab_size)
        for row, step in itertools.product(range(len(seen)), range(tokens.shape[1])):
            line, here = seen[row].tolist(), before + step
            for at in range(max(0, here - self.reach), here):
                same = 0
                while same < 12 and at >= same and line[at - same] == line[here - same]:
                    same += 1
                logits[row, step, line[at + 1]] += 2.0**same - 1
        if targets is None:
            return logits, ModelState(seen, {})
        nll = -logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0] * weight
        return LossOutput(nll.sum(), nll), ModelState(seen, {})


@pytest.mark.parametrize("kind", KINDS[:-1], ids=lambda kind: kind.name)
def test_what_is_in_reach_is_recalled_and_nothing_else(
    kind: NeedleKind, tokenizer: Tokenizer, haystack: recall.Haystack
) -> None:
    def found(reach: int) -> recall.Needles:
        return recall.find_needles(Copier(reach), tokenizer, None, kind, 200, haystack, trials=12)

    near, far = found(10**6), found(150)
    assert (near.kind, near.distance, near.trials, near.chance) == (kind.name, 200, 12, 0.1)
    assert (near.right, near.free) == (12, 12)
    assert far.right <= 6
    assert far.free <= 2
    assert near.low == pytest.approx(recall.wilson_interval(12, 12)[0])


def test_a_new_model_guesses_and_the_same_seed_gives_the_same(tokenizer: Tokenizer, haystack: recall.Haystack) -> None:
    model = MMRecModel(CONFIG, seed=1)
    read: list[int] = []
    first, second = (
        recall.find_needles(model, tokenizer, "text", KINDS[1], 40, haystack, trials=20, seed=3, progress=read.append)
        for _ in range(2)
    )
    assert first == second
    assert first.low < 0.1 < first.high
    assert sum(read) / 40 == pytest.approx(recall.row_tokens(40), abs=250)


def test_rows_of_any_lengths_are_read_side_by_side(tokenizer: Tokenizer) -> None:
    model = MMRecModel(CONFIG, seed=1)
    texts = [("The market", [" books", " lamps are"]), ("Ada counted 12 lamps. " * 30, [" had", " one or two"])]
    rows = []
    for text, candidates in texts:
        encoded = tokenizer.encode_batch(candidates)
        rows.append(recall._Row(tokenizer.encode(text), encoded + [[3]] * (recall.CANDIDATES - 2), candidates[0]))
    with torch.no_grad():
        state = recall._read(model, [row.tokens[:-1] for row in rows], None, lambda tokens: None)
        last = torch.tensor([row.tokens[-1] for row in rows])
        right = recall._right_candidates(model, state, last, rows, None)
        expected = 0
        for row in rows:
            nats = []
            for candidate in row.candidates:
                logits, _ = model(torch.tensor([[*row.tokens, *candidate[:-1]]]))
                lines = logits[0, -len(candidate) :].log_softmax(-1)
                nats.append(-float(sum(line[token] for line, token in zip(lines, candidate, strict=True))))
            expected += nats[0] == min(nats)
    assert right == expected


@pytest.mark.parametrize(("answer", "is_right"), [("books", True), ("boo", False), ("lamps", False)])
def test_a_free_answer_has_to_begin_with_the_whole_answer(tokenizer: Tokenizer, answer: str, is_right: bool) -> None:
    text = tokenizer.encode("Ada counted 12 lamps. The market has books and books and books. The market has")
    row = recall._Row(text, [tokenizer.encode(" books")], answer)
    state = recall._read(Copier(10**6), [row.tokens[:-1]], None, lambda tokens: None)
    last = torch.tensor([row.tokens[-1]])
    assert recall._right_free_answers(Copier(10**6), state, last, [row], None, tokenizer) == is_right


def test_bytes_of_a_state() -> None:
    model = MMRecModel(CONFIG)
    state = model.initial_state(1, "text")
    memory = state.experts["text"][2].memory
    assert memory is not None
    one = 8 + 3 * state.experts["text"][0].h.nbytes + sum(tensor.nbytes for tensor in memory)
    assert recall.state_bytes(model, "text") == one
    assert recall.state_bytes(model) == 2 * one - 8


def test_no_module_but_recall_reads_the_templates() -> None:
    root = Path(mm_rec.__file__).parent
    readers = set()
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = (
                [node.module or "", *(alias.name for alias in node.names)] if isinstance(node, ast.ImportFrom) else []
            )
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if any("needle_templates" in name for name in names):
                readers.add(path.relative_to(root).as_posix())
    assert readers == {"evaluation/recall.py"}


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+", re.sub(r"\{\w+\}", "_", text).lower())


def sequences(texts: list[str], length: int) -> set[tuple[str, ...]]:
    """Sequences of so many words, of which at least two are not filled in."""
    found = set()
    for text in texts:
        words = words_of(text)
        for at in range(len(words) - length + 1):
            part = tuple(words[at : at + length])
            if sum(word != "_" for word in part) > 1:
                found.add(part)
    return found


def test_training_rows_share_no_wording_key_or_kind_of_key_with_the_needles(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    said = [text for kind in KINDS for pair in kind.wordings for text in (*pair, *kind.others)]
    taught = [
        text
        for wordings in (recall_wordings.TEXT, recall_wordings.CODE)
        for templates in vars(wordings).values()
        for text in templates
    ]
    assert sequences([*said, NOISE], 4) & sequences(taught, 4) == set()
    content = {word for text in [*said, NOISE] for word in words_of(text) if len(word) > 3} - {"what", "which"}
    nouns = {noun for wording in recall_wordings.NOUNS for noun in (wording, wording + "s")}
    assert content & nouns == set()
    # Keys of the tests are names with a capital; of the rows, everything that is inserted but does not count is
    # template, key or value, and the wordings have capitals at the start of a sentence alone.
    assert all(key[0].isupper() and key.istitle() for kind in KINDS for key in kind.keys)
    write_synthetic(tmp_path, 40)
    data = prepare(tmp_path, 512, filters=False)
    own = {word for text in (*synthetic_text(40), *taught) for word in re.findall(r"\w+", text)}
    names = {word for kind in KINDS for key in kind.keys for word in key.split()}
    for document in recall_documents(data.train["text"], data.tokenizer, "text", 30_000, 1):
        row = data.tokenizer.decode(document.tokens)
        assert not names & set(re.findall(r"\w+", row))
        assert set(re.findall(r"\b[A-Z]\w+", row)) <= own
        assert not any(phrase in row for phrase in ("pass key", "cedar trees", "lighthouse", "Captain's log"))


def test_wordings_that_are_alike_would_be_found() -> None:
    kind = replace(KINDS[1], wordings=(("The {noun} given for {key} was {value}.", ""),))
    said = [text for pair in kind.wordings for text in pair]
    assert sequences(said, 4) & sequences(list(recall_wordings.TEXT.statements), 4)
