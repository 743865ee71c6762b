"""Formats of conversations, faults with file and line, and which tokens are learned."""

import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mm_rec.data.conversations import encode_document, find_conversations, parse_conversation, read_conversations
from mm_rec.data.files import BadRows
from mm_rec.errors import UserError
from mm_rec.text.conversation import Message
from mm_rec.text.tokenizer import Tokenizer, train_tokenizer

HELLO = [Message("user", "Hello"), Message("assistant", "Hi!")]
SYSTEM = [Message("system", "Be kind."), *HELLO]
ROW = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi!"}]}

FIELDS = ("messages", "conversations", "instruction", "input", "output", "prompt", "completion", "context", "response")
NULLS: dict[str, Any] = dict.fromkeys(FIELDS)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["Hello, Hi! Be kind. Be brief."] * 3, 300)


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        (ROW, HELLO),
        (ROW["messages"], HELLO),
        ({"messages": [{"role": "developer", "content": "Be kind."}, *ROW["messages"]]}, SYSTEM),
        ({"messages": [{"role": "user", "name": "<|end|>", "content": "Hello"}, ROW["messages"][1]]}, HELLO),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": part} for part in ("Hel", "lo")]},
                          ROW["messages"][1]]},
            HELLO,
        ),
        ({"id": 1, "conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi!"}]}, HELLO),
        ({"system": "Be kind.", "conversations": ROW["messages"]}, SYSTEM),
        ({"system": "Be kind.", "messages": ROW["messages"]}, SYSTEM),
        ({"instruction": "Hello", "input": "", "output": "Hi!"}, HELLO),
        ({"instruction": "Hello", "output": "Hi!", "system": "Be kind.", "history": []}, SYSTEM),
        (
            {"instruction": "Sum up", "input": "Long text", "output": "Text", "history": [["Hello", "Hi!"]]},
            [*HELLO, Message("user", "Sum up\n\nLong text"), Message("assistant", "Text")],
        ),
        ({"prompt": "Hello", "completion": "Hi!"}, HELLO),
        ({"instruction": "Hello", "context": "", "response": "Hi!", "category": "open_qa"}, HELLO),
        (
            {"instruction": "Sum up", "context": "Long text", "response": "Text", "category": "summarization"},
            [Message("user", "Sum up\n\nLong text"), Message("assistant", "Text")],
        ),
        ({"instruction": "Hello", "response": "Hi!"}, HELLO),
        ({"prompt": "Hello", "response": "Hi!", "system": "Be kind."}, SYSTEM),
        ({"question": "Hello", "answer": "Hi!"}, HELLO),
        ({**NULLS, "instruction": "Hello", "output": "Hi!"}, HELLO),
        ({**NULLS, "conversations": [{**NULLS, "from": "human", "value": "Hello"}, ROW["messages"][1]]}, HELLO),
        ({**NULLS, "messages": [{**one, "tool_calls": None, "from": None} for one in ROW["messages"]]}, HELLO),
        ({"instruction": "Hello", "input": float("nan"), "output": "Hi!", "history": None}, HELLO),
        ({"prompt": ROW["messages"][:1], "completion": ROW["messages"][1:]}, HELLO),
    ],
)  # fmt: skip
def test_formats_are_known_by_their_content(row: Any, messages: list[Message]) -> None:
    assert parse_conversation(row) == messages


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("text", "object or a list"),
        (None, "object or a list"),
        ({}, "no conversation"),
        ({"text": "a document"}, "no conversation"),
        ([], "no answer"),
        ({"messages": {}}, "not a list"),
        ({"messages": ["Hello"]}, "not an object"),
        ({"messages": [{"role": "user", "content": "Hello"}]}, "no answer"),
        ({"messages": [{"role": "assistant", "content": " \n"}]}, "is empty"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": []}]}, "no content"),
        ({"messages": [{"role": "tool", "content": "3"}]}, "role of a message is 'tool'"),
        ({"messages": [{"role": "<|end|>", "content": "3"}]}, "role of a message"),
        ({"messages": [{"role": ["user"], "content": "3"}]}, "role of a message"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "reads text only"),
        ({"messages": [{"role": "user", "content": "a\0b"}]}, "NUL"),
        ({"instruction": 3, "output": "Hi!"}, "instruction is not a string"),
        ({"instruction": "Hello", "output": "Hi!", "history": [["one"]]}, "history"),
        ({"prompt": "Hello", "completion": "a\0b"}, "NUL"),
        ({"prompt": "Hello", "completion": "a\ud800b"}, "lone surrogate"),
    ],
)
def test_what_is_wrong_is_said(row: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        parse_conversation(row)


def jsonl(path: Path) -> None:
    path.write_text(json.dumps(ROW) + "\n\n" + json.dumps(ROW) + "\n")


def xz(path: Path) -> None:
    path.write_bytes(lzma.compress(json.dumps(ROW).encode() * 1 + b"\n" + json.dumps(ROW).encode()))


def json_list(path: Path) -> None:
    path.write_text("\ufeff" + json.dumps([ROW, ROW], indent=1), encoding="utf-8")


def parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([ROW, ROW]), path)


@pytest.mark.parametrize(
    ("name", "write"),
    [("a.jsonl", jsonl), ("a.jsonl.xz", xz), ("a.json", json_list), ("b.json", jsonl), ("a.parquet", parquet)],
)
def test_kinds_of_files(tmp_path: Path, name: str, write: Callable[[Path], None]) -> None:
    write(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not a conversation")
    assert find_conversations(tmp_path) == [tmp_path / name]
    assert find_conversations(tmp_path / name) == [tmp_path / name]
    assert list(read_conversations(tmp_path / name, BadRows())) == [HELLO, HELLO]


MIXED = [
    {"messages": ROW["messages"]},
    {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi!"}]},
    {"instruction": "Hello", "input": "", "output": "Hi!"},
    {"instruction": "Hello", "context": "", "response": "Hi!", "category": "open_qa"},
    {"prompt": "Hello", "completion": "Hi!"},
    {"messages": [{"role": "user", "content": "Hello", "tool_calls": None}, ROW["messages"][1]]},
]


def by_pandas_lines(path: Path) -> None:
    pandas.DataFrame(MIXED).to_json(path, orient="records", lines=True)


def by_pandas_records(path: Path) -> None:  # in which pandas writes NaN for what is not there
    path.write_text("\n".join(json.dumps(row) for row in pandas.DataFrame(MIXED).to_dict("records")))


def by_pandas_parquet(path: Path) -> None:
    pandas.DataFrame(MIXED).to_parquet(path)


def by_pyarrow(path: Path) -> None:
    names = {name: None for row in MIXED for name in row}
    pq.write_table(pa.Table.from_pylist([names | row for row in MIXED]), path)


def by_datasets_lines(path: Path) -> None:
    datasets.Dataset.from_pandas(pandas.DataFrame(MIXED)).to_json(path)


def by_datasets_parquet(path: Path) -> None:
    datasets.concatenate_datasets([datasets.Dataset.from_list([row]) for row in MIXED[:-1]]).to_parquet(path)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.jsonl", by_pandas_lines), ("b.jsonl", by_pandas_records), ("c.parquet", by_pandas_parquet),
        ("d.parquet", by_pyarrow), ("e.jsonl", by_datasets_lines), ("f.parquet", by_datasets_parquet),
    ],
)  # fmt: skip
def test_rows_of_several_formats_filled_with_null(tmp_path: Path, name: str, write: Callable[[Path], None]) -> None:
    write(tmp_path / name)
    assert list(read_conversations(tmp_path / name, BadRows())) == [HELLO] * (
        len(MIXED) - (write is by_datasets_parquet)
    )


def by_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("\n".join(map(json.dumps, rows)))


def by_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)


@pytest.mark.parametrize("text", ["", " \n"])
@pytest.mark.parametrize(("name", "write"), [("a.jsonl", by_lines), ("b.json", by_lines), ("c.parquet", by_parquet)])
def test_rows_of_several_formats_filled_with_empty_values(
    tmp_path: Path, name: str, write: Callable[[Path, list[dict[str, Any]]], None], text: str
) -> None:
    message = {"role": "", "content": text, "from": "", "value": text}
    turns = [[message | turn for turn in row.get("conversations") or row["messages"]] for row in MIXED[:2]]
    lists: dict[str, Any] = {"messages": [], "conversations": []}
    texts = {name: text for row in MIXED for name in row if name not in lists}
    rows = [lists | texts | {"messages": turns[0]}, lists | texts | {"conversations": turns[1]}]
    rows += [lists | texts | row for row in MIXED[2:5]]
    write(tmp_path / name, rows)
    assert list(read_conversations(tmp_path / name, BadRows())) == [HELLO] * 5


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"messages": [], "instruction": "", "output": ""}, "an answer of the assistant is empty"),
        ({"messages": [], "instruction": "Hello"}, "there is no answer"),
        ({"messages": [], "conversations": []}, "there is no answer"),
        ({"instruction": "Hello", "output": "", "response": "", "answer": 5}, "the answer is not a string"),
    ],
)
def test_rows_that_hold_nothing_are_refused(row: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        parse_conversation(row)


def test_nothing_to_read_is_an_error(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.json"):
        with pytest.raises(UserError, match=r"no conversations|no file"):
            find_conversations(path)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_bad_rows_are_named_by_file_and_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    rows = [json.dumps(row) for row in (ROW, {"messages": 3}, ROW, {"text": ""}, ROW)]
    path.write_text("[" + ",\n".join(rows) + "]" if name.endswith(".json") else "\n".join(rows))
    with pytest.raises(UserError, match=rf"{name}:2: the messages are not a list; .*--skip_bad"):
        list(read_conversations(path, BadRows()))
    with pytest.raises(UserError, match=rf"{name}:4: .*more than 1 bad rows"):
        list(read_conversations(path, BadRows(cap=1)))
    bad = BadRows(cap=2)
    assert len(list(read_conversations(path, bad))) == 3
    assert [problem.split(": ")[0] for problem in bad.found] == [f"{path}:2", f"{path}:4"]


@pytest.mark.parametrize(
    ("content", "rows", "line", "problem"),
    [
        ("[1,\n2", 2, 2, "lacks a comma"),
        ("[1\n\n2]", 1, 3, "lacks a comma"),
        ("[1,\n{\n'a'}]", 1, 3, "not valid JSON"),
        ("[1,\n", 1, 2, "not valid JSON"),
        ("[", 0, 1, "not valid JSON"),
        ("[\n" + "[" * 200_000, 0, 2, "nested too deeply"),
        ("[1,\n\udcff]", 0, 2, "not UTF-8"),
    ],
)
def test_broken_lists_are_read_up_to_the_fault(
    tmp_path: Path, content: str, rows: int, line: int, problem: str
) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    bad = BadRows(cap=10)
    assert list(read_conversations(path, bad)) == []
    assert len(bad.found) == rows + 1  # the numbers before the fault are no conversations either
    assert bad.found[-1].startswith(f"{path}:{line}: ")
    assert problem in bad.found[-1]


def test_the_loss_counts_answers_and_their_ends(tokenizer: Tokenizer) -> None:
    document = encode_document(tokenizer, [*SYSTEM, Message("user", "Be brief."), Message("assistant", "Hi")])
    assert document.loss_mask is not None
    assert document.tokens[0] == tokenizer.bos_id
    learned = [token for token, counts in zip(document.tokens, document.loss_mask, strict=True) if counts]
    end = [tokenizer.end_id]
    assert learned == tokenizer.encode("Hi!") + end + tokenizer.encode("Hi") + end
    assert document.n_bytes == 5


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_number_of_thousands_of_digits_is_a_bad_row(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    sound = '{"prompt": "one", "completion": "two"}'
    number = '{"prompt": ' + "9" * 5000 + "}"
    path.write_text(f"[{sound}, {number}]" if name == "a.json" else f"{sound}\n{number}\n")
    with pytest.raises(UserError, match="a number has too many digits"):
        list(read_conversations(path, BadRows()))
    assert len(list(read_conversations(path, BadRows(1)))) == 1
