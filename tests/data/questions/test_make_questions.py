"""Questions with answers: copied from their passage, held out by whole entries, none nearly the same as another."""

import random
from difflib import SequenceMatcher

import pytest
from made_up_entries import made_up_entries

from mm_rec.data.conversations import parse_conversation
from mm_rec.data.documents.reading import ReadOptions
from mm_rec.data.questions import make
from mm_rec.data.questions.entries import Entry, Fact
from mm_rec.data.questions.folder import entries_of_folder, preview, write_questions
from mm_rec.data.questions.make import make_questions
from mm_rec.data.questions.programs import entries_of_program
from mm_rec.data.questions.similarity import NearTexts
from mm_rec.data.questions.texts import entries_of_text
from mm_rec.data.questions.wordings import MEMORY_KINDS, WORDINGS
from mm_rec.errors import UserError

PROGRAM = '''
"""A module."""

class Shelf(Board, Box):
    """A board that holds books in the order of their names."""

    def find(self, title: str, *, strict: bool = False, limit=10):
        """Return the place of a book.

        Args:
            title: The name on the back of the book.
            shelf: Nothing of this function.

        Raises KeyError if there is no such book.
        """
        place = self.places[title]
        return place - 1

    def _hidden(self):
        """Return what nobody asks for."""

def take(shelf, n=3):
    if n < 0:
        raise ValueError("n is negative")
    shelf.count -= n
'''

TEXT = """\
Of libraries
============

A library is a house in which books are kept for everybody. It opens at nine.

## How long can I keep a book?

You can keep a book for four weeks. After that you pay a fee.

```
A fence is a thing that is not read here at all.
```

**Loan**: the [time](https://example.org/time) for which a book is given away.

Q: Who may borrow books? A: Everybody who lives in the town may borrow them.

reader
    A person who has a card of the library and uses it.
"""

TURKISH = """\
Kütüphaneler
------------

Kütüphane, kitapların herkes için saklandığı yerdir. Saat dokuzda açılır.

## Bir kitap ne kadar süre bende kalabilir?

Bir kitabı dört hafta boyunca saklayabilirsiniz.
"""


def facts(entries: list[Entry]) -> set[tuple[str, str, str, str]]:
    return {(entry.name, fact.kind, fact.subject, fact.answer) for entry in entries for fact in entry.facts}


def test_what_a_program_tells():
    entries = list(entries_of_program(PROGRAM, "library"))
    assert facts(entries) == {
        ("Shelf", "class", "", "A board that holds books in the order of their names."),
        ("Shelf", "bases", "", "Board, Box"),
        ("find", "does", "", "Return the place of a book."),
        ("find", "returns", "", "Return the place of a book."),
        ("find", "parameters", "", "title: str, *, strict: bool=False, limit=10"),
        ("find", "default", "strict", "False"),
        ("find", "default", "limit", "10"),
        ("find", "parameter", "title", "The name on the back of the book."),
        ("find", "raises", "", "Raises KeyError if there is no such book."),
        ("find", "value", "", "place - 1"),
        ("take", "exception", "", "ValueError"),
        ("take", "parameters", "", "shelf, n=3"),
        ("take", "default", "n", "3"),
    }
    assert {entry.full_name for entry in entries} == {"library.Shelf", "library.Shelf.find", "library.take"}
    assert all(fact.answer in entry.passage for entry in entries for fact in entry.facts)
    assert list(entries_of_program("def broken(:")) == []


def test_what_a_text_tells():
    entries = list(entries_of_text(TEXT))
    library = "A library is a house in which books are kept for everybody."
    assert facts(entries) == {
        ("Of libraries", "section", "", library),
        ("library", "definition", "", library),
        ("How long can I keep a book?", "asked", "", "You can keep a book for four weeks."),
        ("Loan", "definition", "", "the time for which a book is given away."),
        ("Who may borrow books?", "asked", "", "Everybody who lives in the town may borrow them."),
        ("reader", "definition", "", "A person who has a card of the library and uses it."),
    }
    assert all(fact.answer in entry.passage for entry in entries for fact in entry.facts)


def test_what_a_turkish_text_tells():
    entries = list(entries_of_text(TURKISH))
    library = "Kütüphane, kitapların herkes için saklandığı yerdir."
    assert facts(entries) == {
        ("Kütüphaneler", "section", "", library),
        ("Kütüphane", "definition", "", library),
        ("Bir kitap ne kadar süre bende kalabilir?", "asked", "", "Bir kitabı dört hafta boyunca saklayabilirsiniz."),
    }
    asked = [pair.question for pair in make_questions(entries).train]
    assert all("nedir" in one or "ne demektir" in one or "bölüm" in one or "kalabilir" in one or "terim" in one
               for one in asked)  # fmt: skip


def test_whole_entries_are_held_out_and_none_is_nearly_asked_in_training():
    questions = make_questions(made_up_entries(900))
    trained, held_out = ({pair.entry for pair in pairs} for pairs in (questions.train, questions.held_out))
    assert len(trained) > 500
    assert len(held_out) > 5
    assert not trained & held_out
    asked = [pair.question for pair in questions.train]
    for pair in questions.held_out:
        assert all(SequenceMatcher(None, pair.question, one, autojunk=False).ratio() < 0.8 for one in asked)
    assert {pair.sort for pair in questions.train} == {"open", "memory"}
    assert all(entry not in talk[0]["content"] for talk in questions.conversations for entry in held_out)


def test_the_same_entries_give_the_same_questions_whatever_else_there_is():
    entries = list(made_up_entries(900))
    first = make_questions(entries)
    assert make_questions(entries) == first
    assert make_questions(entries, seed=1).train != first.train
    more = {pair.entry for pair in make_questions(made_up_entries(1200), seed=5).train}
    assert not more & {pair.entry for pair in first.held_out}


def test_questions_that_are_near_to_one_to_train_on_are_not_held_out(monkeypatch):
    alike = [
        Entry(f"name{at}", f"place.name{at}", f"name{at}: the same words in every place", (Fact("does", f"x{at}"),))
        for at in range(300)
    ]
    assert make_questions(alike).held_out == []
    monkeypatch.setattr(make, "LEAST_SIMILARITY", 1.01)
    assert make_questions(alike).held_out


def test_an_answer_of_many_questions_is_no_more_asked_for():
    common = [Entry(f"f{at}", f"m.f{at}", f"def f{at}(a=None)", (Fact("default", "None", "a"),)) for at in range(900)]
    pairs = make_questions(common).train
    assert 3 <= len(pairs) <= 0.02 * 900


@pytest.mark.parametrize("least", [0.5, 0.8, 0.95])
def test_near_texts_are_those_of_the_longest_common_subsequence(least):
    chance = random.Random(1)
    base = ["".join(chance.choices("abcd é", k=n)) for n in (1, 5, 63, 64, 65, 130, 200)]
    texts = base + ["".join(c for c in one if chance.random() < 0.85) + "ab" for one in base]
    for text in texts:
        others = [one for one in texts if one != text]
        similar = max(2 * common_length(text, one) / (len(text) + len(one)) for one in others)
        assert NearTexts(others, least).has_near(text) == (similar >= least)
        assert max(SequenceMatcher(None, text, one, autojunk=False).ratio() for one in others) <= similar


def common_length(first: str, second: str) -> int:
    row = [0] * (len(second) + 1)
    for one in first:
        before = row
        row = [0]
        for at, other in enumerate(second):
            row.append(before[at] + 1 if one == other else max(before[at + 1], row[at]))
    return row[-1]


def test_every_wording_has_its_places():
    for language, kinds in WORDINGS.items():
        for kind, templates in kinds.items():
            assert len(set(templates)) == len(templates)
            for template in templates:
                filled = template.format(name="NAME", subject="SUBJECT")
                assert "NAME" in filled, (language, kind)
                assert ("SUBJECT" in filled) == (kind in ("parameter", "default"))
    assert set(WORDINGS["en"]) >= MEMORY_KINDS


def test_a_folder_of_documents_gives_conversations(tmp_path):
    documents = tmp_path / "documents"
    documents.mkdir()
    (documents / "library.py").write_text(PROGRAM)
    (documents / "page.html").write_text("<p>A shelf is a board on which many books stand.</p>")
    for at in range(30):
        (documents / f"{at}.md").write_text(TEXT.replace("library", f"{'abcdefghij'[at % 10] * 3}library{at}"))
    names = {entry.name for entry in entries_of_folder(documents, ReadOptions())}
    assert {"Shelf", "find", "shelf", "Loan"} <= names
    made = write_questions(documents, "chat", tmp_path / "made", ReadOptions(), seed=0)
    rows = [parse_conversation(row) for row in map(__import__("json").loads, made.train.read_text().splitlines())]
    assert len(rows) == len(made.questions.train) + len(made.questions.conversations)
    told: list[str] = []
    preview(made.questions, told.append)
    assert f"{len(made.questions.train)} pairs to train on" in told[0]
    assert len(told) > 2
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / "a.txt").write_text("Nothing to ask.")
    with pytest.raises(UserError, match="gives 0 questions and training needs 20: they are made from headings"):
        write_questions(tmp_path / "few", "instruct", tmp_path / "made", ReadOptions(), seed=0)
