"""Turkish: bytes a token of a tokenizer trained on it, and `small` against a GPT-2 of about the same size.

    for package in libgtk-3-common libreoffice-help-tr libreoffice-l10n-tr manpages-tr debian-handbook
    do apt-get download $package && dpkg-deb -x $package*.deb packages; done
    python -m benchmarks.turkish --packages packages /

The text is what Debian packages, these and those that are installed, carry of documentation and translations: help
pages, manual pages, a handbook and the texts of programs. Paragraphs that come again are kept once, and those that are
not in Turkish are left out. Every twentieth document is held out. Both models get the same text and the same processor
time, each at the learning rate that was its best in benchmarks.quality, whose contestants, loop and score are these.
"""

from __future__ import annotations

import argparse
import gettext
import gzip
import hashlib
import json
import platform
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality import VOCABULARY, Data, train_and_score
from mm_rec.data.documents.markup import html_text
from mm_rec.data.download.builtin import builtin_text
from mm_rec.data.filters import quality_problem
from mm_rec.data.pack import Document, write_store
from mm_rec.machine.device import select_precision
from mm_rec.text.tokenizer import Tokenizer, train_tokenizer

RESULT = Path(__file__).parent / "results" / "turkish.json"
RATES = {"small": 2e-3, "gpt2": 1e-3}
MOST_BYTES = 5_000_000
HELD_OUT = 20  # one document of so many
LETTERS_OF_ITS_OWN = re.compile(r"[ığşöüçİĞŞÖÜÇ]")
SHARE_OF_THEM = 0.02  # of the signs of a paragraph, at least
FEWEST_WORDS = 5
ENGLISH_DOCUMENTS = 1500  # of this machine's documentation, for the tokenizer to compare with

Text = tuple[str, str]
"""A kind of document, and its text."""


def help_pages(root: Path) -> Iterator[Text]:
    """Pages of HTML."""
    for path in sorted([*root.glob("usr/share/**/tr/**/*.html"), *root.glob("usr/share/**/tr-TR/**/*.html")]):
        yield "help", html_text(path.read_text(encoding="utf-8"))


def manual_pages(root: Path) -> Iterator[Text]:
    """Manual pages without the commands of their layout."""
    for path in sorted(root.glob("usr/share/man/tr/man*/*.gz")):
        if path.is_symlink():
            continue
        page = gzip.decompress(path.read_bytes()).decode("utf-8", "replace")
        page = re.sub(r"(?m)^[.'].*$", "\n", page)
        yield "manual", re.sub(r"\\f[A-Z]|\\&|\\", "", page)


def translations(root: Path) -> Iterator[Text]:
    """The texts of programs, all of a catalogue in one document."""
    for path in sorted(root.glob("usr/**/tr/LC_MESSAGES/*.mo")):
        with path.open("rb") as file:
            catalogue = gettext.GNUTranslations(file)
        texts = (text for text in vars(catalogue)["_catalog"].values() if isinstance(text, str))
        yield "translation", "\n\n".join(texts)


def is_turkish(paragraph: str) -> bool:
    """Whether a paragraph has words enough, and letters that Turkish has and English does not."""
    words = re.findall(r"[^\W\d_]+", paragraph)
    own = len(LETTERS_OF_ITS_OWN.findall(paragraph))
    return len(words) >= FEWEST_WORDS and own >= SHARE_OF_THEM * len(paragraph)


def documents(roots: Sequence[Path]) -> Iterator[Text]:
    """Every document with the paragraphs that are in Turkish and stand nowhere before."""
    seen: set[str] = set()
    for pages in (help_pages, manual_pages, translations):
        for kind, text in chain.from_iterable(map(pages, roots)):
            kept = []
            for paragraph in (" ".join(one.split()) for one in re.split(r"\n\s*\n", text)):
                if paragraph not in seen and is_turkish(paragraph):
                    seen.add(paragraph)
                    kept.append(paragraph)
            if kept:
                yield kind, "\n\n".join(kept)


def collect(roots: Sequence[Path]) -> tuple[list[str], dict[str, Any]]:
    """Returns the first 5 MB of documents in an order by their hashes, and what there is and was kept."""
    found = sorted(documents(roots), key=lambda one: hashlib.sha256(one[1].encode()).digest())
    sizes: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    texts: list[str] = []
    for kind, text in found:
        if problem := quality_problem(text, "text"):
            dropped[problem] += 1
        elif sizes.total() < MOST_BYTES:
            sizes[kind] += len(text.encode())
            texts.append(text)
    account = {"documents": len(found), "kept": len(texts), "left out by filters": dict(dropped), "bytes": dict(sizes)}
    return texts, account


def prepare(texts: list[str], folder: Path) -> Data:
    """Train the tokenizer on the documents that are not held out, and pack both parts."""
    valid = texts[::HELD_OUT]
    train = [text for index, text in enumerate(texts) if index % HELD_OUT]
    tokenizer = train_tokenizer(iter(train), VOCABULARY)
    stores = []
    for split, part in (("train", train), ("valid", valid)):
        packed = (Document([tokenizer.bos_id, *tokenizer.encode(text)], len(text.encode())) for text in part)
        stores.append({"text": write_store(folder / split, packed, vocab_size=tokenizer.vocab_size)})
    return Data(tokenizer, *stores)


def bytes_per_token(tokenizer: Tokenizer, texts: list[str]) -> float:
    """Over all the texts."""
    return round(sum(len(one.encode()) for one in texts) / sum(len(tokenizer.encode(one)) for one in texts), 3)


def main(argv: list[str] | None = None) -> int:
    """Collect the text, train both models, print and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--packages", type=Path, nargs="+", default=[Path("/")], help="where the packages lie unpacked (default /)"
    )
    parser.add_argument("--minutes", type=float, default=2.0, help="of one processor, for each model; 0 trains none")
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args(argv)
    texts, account = collect(options.packages)
    print(json.dumps(account, ensure_ascii=False), flush=True)
    precision = select_precision("auto", torch.device("cpu"))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = prepare(texts, Path(folder))
        held_out = texts[::HELD_OUT]
        english = train_tokenizer(islice(builtin_text(), ENGLISH_DOCUMENTS), VOCABULARY)
        tokens = {
            name: bytes_per_token(one, held_out) for name, one in (("Turkish", data.tokenizer), ("English", english))
        }
        print(json.dumps(tokens), flush=True)
        for name, rate in RATES.items() if options.minutes else ():
            seconds = options.minutes * 60 * torch.get_num_threads()
            row = train_and_score(name, "adamw", rate, data, options.batch_size, seconds, None, precision)
            (bits,) = row["bits_per_byte"].values()
            rows.append({**row, "bits_per_byte": bits})
            print(json.dumps(rows[-1]), flush=True)
    settings = {
        "minutes": options.minutes, "threads": torch.get_num_threads(), "batch": [options.batch_size, 512],
        "precision": precision, "vocabulary": data.tokenizer.vocab_size,
        "held-out bytes": sum(len(one.encode()) for one in held_out),
        "machine": platform.processor() or platform.machine(), "torch": torch.__version__,
    }  # fmt: skip
    result = {"text": account, "bytes a token by a tokenizer of": tokens, "settings": settings, "runs": rows}
    options.output.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
