"""Work for the supervisor: read a file that stands for far more than it is, and say how much memory that took."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

from mm_rec.data.conversations import read_conversations
from mm_rec.data.documents.reading import read_plain
from mm_rec.data.files import BadRows, read_rows, read_texts
from mm_rec.storage.yaml_file import read_yaml
from mm_rec.text.tokenizer import train_tokenizer


def read_any_texts(path: Path, bad: BadRows) -> Iterator[str]:
    return read_plain(path) if path.suffix == ".txt" else read_texts(path, bad)


READERS = {"texts": read_any_texts, "rows": read_rows, "conversations": read_conversations}
ADDRESS_BYTES = 6 << 30
"""For the process: what asks for more fails, and nothing happens to the machine."""


def peak() -> int:
    """Bytes of memory that this process ever had."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def read(path: str, reader: str, cap: int) -> int:
    """Read a file to its end and print the growth of memory; raises UserError as the reader does."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_BYTES, ADDRESS_BYTES))
    before = peak()
    try:
        if reader == "yaml":
            read_yaml(Path(path))
        elif reader == "tokenizer":
            tokenizer = train_tokenizer(read_any_texts(Path(path), BadRows(cap)), 1024)
            for text in read_any_texts(Path(path), BadRows(cap)):
                assert tokenizer.decode(tokenizer.encode(text)) == text
        else:
            for _ in READERS[reader](Path(path), BadRows(cap)):
                pass
    finally:
        print(f"grown {peak() - before}", flush=True)
    return 0
