"""Row 8: data files with every kind of bad row, and files that are damaged as a whole."""

from __future__ import annotations

import gzip
import json
import lzma
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from damage_workloads import damaged
from workload import Trial, refusal, workload

from mm_rec.data.files import BadRows, read_texts
from mm_rec.data.manifest import check_files, record_file
from mm_rec.data.pack import file_sha256
from mm_rec.errors import UserError

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".jsonl": bytes,
    ".jsonl.gz": gzip.compress,
    ".jsonl.zst": zstandard.ZstdCompressor(write_checksum=True).compress,
    ".jsonl.xz": lzma.compress,
}
LETTERS = 'abcdefghij "\\/\t\néüışğ漢字🙂\u2028\u0085\ufeff\x7f'


def text(rng: random.Random) -> str:
    return "".join(rng.choices(LETTERS, k=rng.randint(1, 40)))


def line(value: object, rng: random.Random) -> bytes:
    return json.dumps(value, ensure_ascii=rng.random() < 0.5).encode()


BAD: dict[str, Callable[[random.Random], bytes]] = {
    "cut JSON": lambda rng: line(text(rng), rng)[:-1],
    "bare words": lambda rng: b"hello " + rng.choice([b"world", b"\xc3\xa4"]),
    "two values": lambda rng: line("a", rng) + b" " + line("b", rng),
    "NUL byte": lambda rng: b'"a' + b"\0" * rng.randint(1, 9) + b'b"',
    "NUL escape": lambda rng: b'"' + b"x" * rng.randrange(9) + b'\\u0000"',
    "lone surrogate": lambda rng: b'"a\\u%04xb"' % rng.randrange(0xD800, 0xE000),
    "lone surrogate in an object": lambda rng: b'{"text": "\\ud%x00"}' % rng.randrange(8, 16),
    "not UTF-8": lambda rng: b'"a' + rng.choice([b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf8\x88"]) + b'"',
    "byte order mark in the midst": lambda rng: b"\xef\xbb\xbf" + line(text(rng), rng),
    "number": lambda rng: str(rng.choice([17, -0.5, 1e300])).encode(),
    "huge number": lambda rng: b"1" * rng.randint(4400, 9000),
    "true": lambda rng: rng.choice([b"true", b"false", b"null", b"NaN", b"Infinity"]),
    "list": lambda rng: line([text(rng)], rng),
    "object without text": lambda rng: line({"body": text(rng)}, rng),
    "wrong text": lambda rng: line({"text": rng.choice([5, None, ["a"], {"text": "a"}])}, rng),
    "deep lists": lambda rng: b"[" * rng.randint(20_000, 60_000),
    "deep objects": lambda rng: b'{"text":' * rng.randint(20_000, 60_000),
}


@workload(
    8, "JSONL files, plain and compressed, with bad rows of 17 kinds between good ones", unit="files",
    quick=300, soak=10_000, idle=["good rows read"],
)  # fmt: skip
def files_with_bad_rows(folder: Path) -> Iterator[Trial]:
    def trial(seed: int) -> str:
        rng = random.Random(seed)
        suffix, end = rng.choice(list(COMPRESS)), rng.choice([b"\n", b"\r\n"])
        good, lines, bad_lines = [], [], []
        for number in range(1, rng.randint(2, 12)):
            if rng.random() < 0.2 and number > 1:
                bad_lines.append(number)
                lines.append(BAD[rng.choice(list(BAD))](rng))
            else:
                good.append(text(rng))
                field = rng.choice([None, "text", "content", "code"])
                lines.append(line(good[-1] if field is None else {"id": 1, field: good[-1]}, rng))
        content = rng.choice([b"", b"\xef\xbb\xbf"]) + end.join(lines) + rng.choice([b"", end, end + b" " + end])
        path = folder / f"rows{suffix}"
        path.write_bytes(COMPRESS[suffix](content))
        skipping = BadRows(len(bad_lines) + 1)
        assert list(read_texts(path, skipping)) == good
        assert [int(found[len(f"{path}:") :].partition(":")[0]) for found in skipping.found] == bad_lines
        for cap in {0, len(bad_lines) - 1} if bad_lines else ():
            message = refusal(UserError, lambda: list(read_texts(path, BadRows(cap))), (bad_lines, cap))  # noqa: B023
            assert message.startswith(f"{path}:{bad_lines[cap]}: "), message
            assert "--skip_bad" in message, message
        return "bad rows named by line, counted and capped, good rows read" if bad_lines else "good rows read"

    yield trial


@workload(
    8, "files damaged as a whole (flips, cuts, zeroed pages), of all formats", unit="files", quick=300, soak=10_000
)
def damaged_files(folder: Path) -> Iterator[Trial]:
    texts = [f"Text {i}: äöü 漢字 🙂" for i in range(40)]
    rows = "".join(json.dumps(one) + "\n" for one in texts).encode()
    for suffix, compress in COMPRESS.items():
        (folder / f"a{suffix}").write_bytes(compress(rows))
    pq.write_table(pa.table({"text": texts}), folder / "a.parquet", write_page_checksum=True)
    files = sorted(folder.iterdir())
    sound = {path: path.read_bytes() for path in files}
    for path in files:
        record_file(folder, path.name, {"sha256": file_sha256(path)})

    def trial(seed: int) -> str:
        rng, path = random.Random(seed), files[seed % len(files)]
        content, kind = damaged(sound[path], rng)
        path.write_bytes(content)
        assert str(path) in refusal(UserError, lambda: check_files(folder, [path]), (kind, path.name))
        outcome = "a file of the user: read in part or refused with file and line"
        for cap in (0, 1000):
            try:
                read = list(read_texts(path, BadRows(cap)))
                assert all("\0" not in one and one.encode() is not None for one in read)
                if cap == 0 and path.suffix in (".gz", ".xz", ".zst"):  # these carry checksums
                    assert read == texts, f"{kind} of {path.name}: read as something else"
            except UserError as error:
                message = str(error)
                assert message.startswith(f"{path}:"), message
                assert "\n" not in message, message
        path.write_bytes(sound[path])
        return f"refused where it was downloaded; {outcome}"

    yield trial
