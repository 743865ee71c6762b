"""Answers and their score: token F1 as SQuAD has it, and which questions are drawn."""

import json
from pathlib import Path

import pytest

from mm_rec.errors import UserError
from mm_rec.evaluation.answers import draw_questions, share_of_good, token_f1


@pytest.mark.parametrize(
    ("said", "right", "expected"),
    [
        ("The list, of names!", "list of names", 1.0),
        ("a cat", "the dog", 0.0),
        ("x y", "x z", 0.5),
        ("x x y", "x", 0.5),
        ("", "x", 0.0),
        ("''", '""', 1.0),
        ("one two three four", "one two", 2 / 3),
    ],
)
def test_token_f1_is_that_of_squad(said: str, right: str, expected: float) -> None:
    assert token_f1(said, right) == pytest.approx(expected)


def test_half_counts_as_right() -> None:
    assert share_of_good([0.5, 0.49, 1.0, 0.0]) == 0.5


def test_questions_are_drawn_by_seed_and_the_sorts_take_turns(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    rows = [
        {"sort": sort, "kind": "does", "messages": [{"role": "user", "content": f"{sort} {at}"}, {"content": "it"}]}
        for sort in ("open", "memory")
        for at in range(30)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn = draw_questions(path, 20)
    assert [one.sort for one in drawn] == ["open", "memory"] * 10
    assert len({one.text for one in drawn}) == 20
    assert draw_questions(path, 20) == drawn
    assert draw_questions(path, 20, seed=1) != drawn
    with pytest.raises(UserError, match="has 30 questions of the sort open, and 31 are to be drawn"):
        draw_questions(path, 62)
    path.write_text("{}\n")
    with pytest.raises(UserError, match="no file of held-out questions"):
        draw_questions(path, 2)
