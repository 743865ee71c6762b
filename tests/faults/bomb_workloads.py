"""Row 25: small files that stand for gigabytes, nest without end or hold words without end, in every reader."""

from __future__ import annotations

import gzip
import lzma
import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from supervisor import Supervisor
from workload import Trial, workload

SECONDS, MEMORY_BYTES = 60.0, 1_500_000_000
MEGABYTE = 1_000_000
Bomb = Callable[[random.Random, Path], tuple[Path, str]]


def repeated(value: object, times: int) -> pa.Array:
    """A column that holds one value once and stands for many."""
    if value is None:  # Parquet keeps nulls apart from its dictionaries
        return pa.nulls(times, pa.string())
    return pa.DictionaryArray.from_arrays(pa.array([0] * times, pa.int32()), pa.array([value]))


def parquet_dictionary(rng: random.Random, folder: Path) -> tuple[Path, str]:
    text = rng.choice("ax ") * rng.randint(1, 10 * MEGABYTE)
    table = pa.table({rng.choice(["text", "content", "other"]): repeated(text, rng.randint(1000, 50_000))})
    pq.write_table(table, folder / "a.parquet", compression=rng.choice(["zstd", "snappy", "gzip", "none"]))
    return folder / "a.parquet", rng.choice(["texts", "rows", "conversations"])


def parquet_delta(rng: random.Random, folder: Path) -> tuple[Path, str]:
    texts = ["y" * rng.randint(100_000, MEGABYTE)] * rng.randint(10, 100)
    pq.write_table(
        pa.table({"text": texts * 10}),
        folder / "a.parquet",
        use_dictionary=False,
        column_encoding={"text": "DELTA_BYTE_ARRAY"},
    )
    return folder / "a.parquet", "texts"


def parquet_nested(rng: random.Random, folder: Path) -> tuple[Path, str]:
    turns = [{"role": "user", "content": "z" * rng.randint(1, MEGABYTE)}, {"role": "assistant", "content": "ok"}]
    rows = [turns * rng.randint(1, 20)] * rng.randint(1, 10)
    table = pa.table({"messages": pa.array(rows)})
    with pq.ParquetWriter(folder / "a.parquet", table.schema, compression="zstd") as writer:
        for _ in range(rng.randint(1, 40)):
            writer.write_table(table)
    return folder / "a.parquet", rng.choice(["rows", "conversations"])


def parquet_rows_of_nothing(rng: random.Random, folder: Path) -> tuple[Path, str]:
    table = pa.table({"text": repeated(rng.choice(["", None, "a"]), 2 * MEGABYTE)})
    with pq.ParquetWriter(folder / "a.parquet", table.schema) as writer:
        for _ in range(rng.randint(1, 20)):
            writer.write_table(table)
    return folder / "a.parquet", "texts"


def packed_lines(rng: random.Random, folder: Path) -> tuple[Path, str]:
    line = rng.choice(
        [
            b"\n",
            b" " * 1000 + b"\n",
            b"a" * 1000,
            b'"' + b"b" * MEGABYTE + b'"\n',
            b'{"text": "c"}\n',
            b"[" * 10_000 + b"\n",
        ]
    )
    piece = line * max(1, 4 * MEGABYTE // len(line))
    suffix = rng.choice(["gz", "xz", "zst"])
    path = folder / f"a.jsonl.{suffix}"
    open_packed = {"gz": gzip.open, "xz": lzma.open, "zst": zstandard.open}[suffix]
    with open_packed(path, "wb") as file:
        for _ in range(rng.randint(10, 80)):
            file.write(piece)
    return path, rng.choice(["texts", "rows", "conversations"])


def deep_json(rng: random.Random, folder: Path) -> tuple[Path, str]:
    depth = rng.choice([10**3, 10**5, 5 * 10**6])
    content = rng.choice(
        ["[" * depth, "[" * depth + "]" * depth, '{"a":' * depth, '{"messages":[' * depth, "[[]," * depth]
    )
    path = folder / rng.choice(["a.jsonl", "a.json"])
    path.write_text(content)
    return path, "conversations"


def odd_json(rng: random.Random, folder: Path) -> tuple[Path, str]:
    values = [
        "1" * 10**6,
        "-" + "9" * 5000,
        "1e999999",
        "NaN",
        '"\\ud800"',
        "[" + "[]," * 10**6 + "0]",
        '{"role": "x"}',
    ]
    value = rng.choice(values)
    row = rng.choice(
        ["{}", '{{"text": {}}}', '{{"messages": {}}}', '[{{"role": {0}, "content": {0}}}]', '{{"prompt": {}}}']
    )
    path = folder / rng.choice(["a.jsonl", "a.json"])
    path.write_text(row.replace("{{", "{").replace("}}", "}").replace("{0}", value).replace("{}", value) + "\n")
    return path, rng.choice(["texts", "conversations"]) if path.suffix == ".jsonl" else "conversations"


def long_lines(rng: random.Random, folder: Path) -> tuple[Path, str]:
    path = folder / rng.choice(["a.txt", "a.jsonl"])
    with path.open("w") as file:
        for _ in range(rng.randint(1, 150)):
            file.write(rng.choice("ab ") * MEGABYTE)
    return path, "texts"


def endless_words(rng: random.Random, folder: Path) -> tuple[Path, str]:
    letters = rng.choice(["ACGT", "a", "ab", "漢字仮名交文", "กขฃคฅฆ", "=-+*/", "0123456789", " ", "\t\n", "éèà"])
    path = folder / "a.txt"
    path.write_text("".join(rng.choices(letters, k=rng.randint(10**5, 10**6))))
    return path, "tokenizer"


def yaml_bomb(rng: random.Random, folder: Path) -> tuple[Path, str]:
    width = rng.randint(2, 10)
    names = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, rng.randint(10, 60)))
    deep = rng.choice(["[", "{a: ", "- ", "? ", "!!seq [", "&x ["]) * rng.choice([50, 5000, 60_000])
    path = folder / "a.yaml"
    path.write_text(
        rng.choice([f"a0: &a0 [x, y]\n{names}", deep, "a: " + "9" * rng.choice([4000, 10**5]), "a: 2024-13-45"])
    )
    return path, "yaml"


BOMBS: tuple[Bomb, ...] = (
    parquet_dictionary, parquet_delta, parquet_nested, parquet_rows_of_nothing, packed_lines, deep_json, odd_json,
    long_lines, endless_words, yaml_bomb, parquet_dictionary, packed_lines,
)  # fmt: skip
"""All kinds first, which are tried in each test run; those of which there are more come twice."""


@workload(25, "Parquet, gzip, xz, zstd, JSON, YAML and text that stand for gigabytes, nest, or hold words without end",
          unit="files", quick=10, soak=120, idle=[])  # fmt: skip
def bombs(folder: Path) -> Iterator[Trial]:
    supervisor = Supervisor(folder)

    def trial(seed: int) -> str:
        rng = random.Random(seed)
        bomb = BOMBS[seed % len(BOMBS)]
        path, reader = bomb(rng, folder)
        context = (bomb.__name__, reader, path.stat().st_size)
        start = time.monotonic()
        child = supervisor.run("bomb_readers.read", path=str(path), reader=reader, cap=rng.choice([0, 0, 3]))
        seconds, log = child.ended[0] - start - child.ended[1], child.log  # without the wait for a processor
        path.unlink()
        assert child.status in (0, 2), (context, child.status, log[-2000:])
        assert seconds < SECONDS, (context, seconds)
        found = re.search(r"^grown (\d+)$", log, re.MULTILINE)
        assert found is not None, (context, log[-2000:])
        assert int(found[1]) < MEMORY_BYTES, (context, found[1])
        name = bomb.__name__.replace("_", " ")
        if child.status == 0:
            return f"{name}: read in bounded memory"
        error = log[found.end() :].strip()
        assert error.startswith("error: "), (context, log[-2000:])
        assert "\n" not in error, (context, error[-2000:])
        assert len(error) < 1000, (context, error[:2000])
        return f"{name}: refused in one line"

    yield trial
