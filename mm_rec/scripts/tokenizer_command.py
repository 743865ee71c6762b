"""Train a tokenizer on a data folder, or show how one cuts a text."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mm_rec.errors import UserError
from mm_rec.program import Parser, run_program
from mm_rec.translation import translate

EPILOG = """examples:
  mm-rec tokenizer --data_dir ./data --vocab_size 8192 --output ./tokenizer
  mm-rec tokenizer --show "def add(a, b): return a + b" --tokenizer ./checkpoints_cpu/stage1

Training commands make the tokenizer that they need; this is for looking at one, or for sharing one.
"""


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    """Parse arguments; train, or show."""
    parser = Parser(prog=prog, description=__doc__, epilog=EPILOG)
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="data to train on (default data)")
    parser.add_argument("--vocab_size", type=int, default=32_000, help="tokens at most (default 32000)")
    parser.add_argument("--output", type=Path, help="folder to make for the trained tokenizer")
    parser.add_argument("--show", metavar="TEXT", help="show how a tokenizer cuts this text")
    parser.add_argument("--tokenizer", type=Path, help="for --show: a tokenizer's folder, a checkpoint or a run folder")
    options = parser.parse_args(arguments)
    if options.show is not None:
        return _show(options)
    if options.output is None:
        raise UserError("name the folder for the tokenizer with --output, or a text to cut with --show")
    return _train(options)


def _train(options: argparse.Namespace) -> int:
    from mm_rec.data.prepare import prepare
    from mm_rec.storage.files import atomic_folder
    from mm_rec.text.tokenizer import MIN_VOCAB_SIZE

    if options.vocab_size < MIN_VOCAB_SIZE:
        raise UserError(
            "--vocab_size must be at least {least}, got {vocab_size}",
            least=MIN_VOCAB_SIZE,
            vocab_size=options.vocab_size,
        )
    if options.output.exists():
        raise UserError(
            "{output} is there already and nothing is overwritten; name a new folder with --output",
            output=options.output,
        )
    prepared = prepare(options.data_dir, options.vocab_size, progress=lambda line: print(line, flush=True))
    with atomic_folder(options.output, manifest=False) as folder:
        prepared.tokenizer.save(folder)
    print(
        translate(
            "{vocab_size:,} tokens, written to {output}",
            vocab_size=prepared.tokenizer.vocab_size,
            output=options.output,
        )
    )
    return 0


def _show(options: argparse.Namespace) -> int:
    from mm_rec.inference.loading import find_checkpoint
    from mm_rec.text.tokenizer import Tokenizer

    if options.tokenizer is None:
        raise UserError("name the tokenizer to show with --tokenizer")
    folder = options.tokenizer
    tokenizer = Tokenizer.load(folder if (folder / "tokenizer.json").is_file() else find_checkpoint(folder))
    try:
        ids = tokenizer.encode(options.show)
    except ValueError as error:
        raise UserError("--show takes UTF-8 text only") from error
    for token in ids:
        sys.stdout.write(f"{token:>6}  {tokenizer.token_bytes[token].decode('utf-8', 'backslashreplace')!r}\n")
    n_bytes = len(options.show.encode())
    print(
        translate(
            "{count} tokens, {n_bytes} bytes, {each:.2f} bytes a token",
            count=len(ids),
            n_bytes=n_bytes,
            each=n_bytes / max(len(ids), 1),
        )
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(run_program(main))
