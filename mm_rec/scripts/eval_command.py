"""Measure a model: bits per byte, how far back it remembers, tasks of lm-eval. Writes a page with pictures."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from mm_rec.errors import UserError
from mm_rec.program import Parser, run_program
from mm_rec.scripts.sampling_options import add_domain_argument, add_weights_argument

if TYPE_CHECKING:
    from mm_rec.evaluation.bits_per_byte import Documents
    from mm_rec.inference.loading import Loaded

EPILOG = """examples:
  mm-rec eval --model checkpoints_cpu --documents text=books.jsonl --documents code=python.jsonl.xz
  mm-rec eval --model checkpoints_cpu --distances 0,1024,16384 --trials 50
  mm-rec eval --model checkpoints_cpu --tasks arc_easy,lambada_openai --limit 200

Documents are .txt, .jsonl (plain, .gz, .zst, .xz) or .parquet, a file or a folder, and are read by each expert and by
all fused. Tasks need `pip install 'mm-rec[eval]'`.
"""

DISTANCES = "0,64,256,1024,4096"


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    """Parse arguments, measure, write the report."""
    parser = Parser(prog=prog, description=__doc__, epilog=EPILOG)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint, run folder or folder of runs")
    parser.add_argument("--output", type=Path, default=Path("evaluation"), metavar="FOLDER", help="for the report")
    parser.add_argument(
        "--documents",
        action="append",
        default=[],
        type=_named_path,
        metavar="NAME=PATH",
        help="to read; may be repeated",
    )
    parser.add_argument("--max_bytes", type=int, metavar="INT", help="of each set of documents; all if not given")
    parser.add_argument(
        "--skip_bad", type=int, default=0, metavar="INT", help="rows that cannot be read to leave out of each set"
    )
    parser.add_argument(
        "--distances", type=_distances, default=DISTANCES, metavar="LIST",
        help=f"tokens over which to remember; `none` leaves recall out (default {DISTANCES})",
    )  # fmt: skip
    parser.add_argument("--trials", type=int, default=16, metavar="INT", help="at each distance (default 16)")
    parser.add_argument("--tasks", metavar="LIST", help="names of lm-eval tasks, separated by commas")
    parser.add_argument("--task_dir", type=Path, metavar="FOLDER", help="of task files of your own")
    parser.add_argument("--limit", type=int, metavar="INT", help="questions of each task; all if not given")
    add_domain_argument(parser)
    parser.add_argument("--seed", type=int, default=0, metavar="INT", help="of what is to be remembered (default 0)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto: CUDA if it is there")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="type of the matrices")
    add_weights_argument(parser)
    options = parser.parse_args(arguments)
    if options.tasks and options.weights != "full":
        parser.error("--tasks are run with full weights; leave one of --tasks and --weights out")
    return _evaluate(options)


def _named_path(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH")
    return name, Path(path)


def _distances(text: str) -> list[int]:
    if text == "none":
        return []
    try:
        distances = [int(one) for one in text.split(",")]
    except ValueError:
        distances = [-1]
    if min(distances) < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers separated by commas")
    return sorted(set(distances))


def _evaluate(options: argparse.Namespace) -> int:
    from mm_rec.evaluation.bits_per_byte import evaluate
    from mm_rec.evaluation.lm_eval import run_harness
    from mm_rec.evaluation.recall import associative_recall, passkey
    from mm_rec.evaluation.report import Measurements, write_report
    from mm_rec.inference.chat_session import QUESTIONS, ChatSession, transcript
    from mm_rec.inference.loading import load_model
    from mm_rec.storage.files import reporting_errors

    loaded = load_model(options.model, device=options.device, precision=options.precision, weights=options.weights)
    model, tokenizer, domain = loaded.model, loaded.tokenizer, loaded.choose_domain(options.domain)
    with reporting_errors(options.output):  # before hours of measuring
        options.output.mkdir(parents=True, exist_ok=True)
    measured = Measurements(_facts(loaded, domain))
    for name, path in options.documents:
        documents = _read_documents(path, loaded, options.max_bytes, options.skip_bad)
        bits = {one or "fused": evaluate(model, documents, one).bits_per_byte for one in (*model.config.experts, None)}
        measured.bits_per_byte[name] = bits
        print(f"{name}: bits per byte by {', '.join(f'{reader} {score:.4f}' for reader, score in bits.items())}")
    for measure, scores in ((associative_recall, measured.associative_recall), (passkey, measured.passkey)):
        for distance in options.distances:
            scores += measure(model, tokenizer, domain, [distance], trials=options.trials, seed=options.seed)
            one = scores[-1]
            print(f"{measure.__name__} over {distance:,} tokens: {one.accuracy:.1%} right, {one.chance:.1%} by chance")
    if options.tasks:
        measured.tasks = run_harness(
            loaded.path, options.tasks.split(","), task_dir=options.task_dir, domain=domain, limit=options.limit,
            device=str(model.embedding.weight.device), precision=measured.model["precision"],
        )  # fmt: skip
        for task, numbers in measured.tasks.items():
            print(f"{task}: " + ", ".join(f"{name} {value:.4f}" for name, value in numbers.items()))
    measured.conversation = transcript(ChatSession.start(model, tokenizer, domain=domain), QUESTIONS)
    print(f"report in {write_report(options.output, measured)}")
    return 0


def _facts(loaded: Loaded, domain: str | None) -> dict[str, str]:
    """What was measured, in words."""
    import torch

    config, weight = loaded.model.config, loaded.model.embedding.weight
    precision = "bf16" if weight.dtype == torch.bfloat16 else "fp32"
    count = sum(parameter.numel() for parameter in loaded.model.parameters())
    return {
        "checkpoint": str(loaded.path),
        "parameters": f"{count / 1e6:.1f} million",
        "shape": f"{len(config.experts)} experts of {config.n_layers} blocks, {config.d_model} wide",
        "vocabulary": f"{loaded.tokenizer.vocab_size:,} tokens",
        "answers by": domain or "all experts, fused",
        "precision": precision + (", int8" if loaded.weights == "int8" else ""),
        "device": str(weight.device),
    }


def _read_documents(path: Path, loaded: Loaded, max_bytes: int | None, skip_bad: int) -> Documents:
    """The documents at ``path`` as tokens, of each no more than a part if there is a cap."""
    import numpy as np

    from mm_rec.data.files import BadRows, find_files, read_texts
    from mm_rec.data.pack import Document, write_store
    from mm_rec.evaluation.bits_per_byte import select_documents

    tokenizer = loaded.tokenizer
    bad = BadRows(skip_bad)
    texts = (text for file in find_files(path) for text in read_texts(file, bad) if text)
    documents = (Document([tokenizer.bos_id, *tokenizer.encode(text)], len(text.encode())) for text in texts)
    with tempfile.TemporaryDirectory() as folder:
        try:
            store = write_store(Path(folder) / "documents", documents, vocab_size=tokenizer.vocab_size)
        except ValueError as error:
            raise UserError(f"there are no documents in {path}") from error
        token_bytes = np.array([len(one) for one in tokenizer.token_bytes])
        chosen = select_documents(store, token_bytes, max_bytes)
    if bad.found:
        print(f"{path}: {len(bad.found)} bad rows left out, the first: {bad.found[0]}")
    if not chosen.tokens:
        raise UserError(f"--max_bytes {max_bytes} leaves nothing of the documents in {path}")
    return chosen


if __name__ == "__main__":
    raise SystemExit(run_program(main))
