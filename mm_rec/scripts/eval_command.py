"""Measure a model: bits per byte, how far back it remembers, tasks of lm-eval. Writes a page with pictures."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mm_rec.errors import UserError
from mm_rec.program import Parser, positive_int, run_program, wrong_argument
from mm_rec.scripts.sampling_options import add_domain_argument, add_weights_argument
from mm_rec.translation import Translatable, translate

if TYPE_CHECKING:
    from mm_rec.evaluation.bits_per_byte import Documents
    from mm_rec.evaluation.recall import Needles
    from mm_rec.evaluation.report import Measurements
    from mm_rec.inference.loading import Loaded

EPILOG = """examples:
  mm-rec eval --model checkpoints_cpu --documents text=books.jsonl --documents code=python.jsonl.xz
  mm-rec eval --model checkpoints_cpu --documents text=books.jsonl --distances 1024,16384 --trials 50
  mm-rec eval --model checkpoints_cpu --tasks arc_easy,lambada_openai --limit 200

Documents are .txt, .jsonl (plain, .gz, .zst, .xz) or .parquet, a file or a folder, and are read by each expert and by
all fused. Needles (something said once, and asked for many tokens later) are hidden in the first of these sets; without
one only a pass key is, in a text of a few sentences. Tasks need the extra `eval`.
"""

DISTANCES = {"cpu": [1024, 4096], "cuda": [1024, 4096, 16_384, 65_536]}
TRIALS = {"cpu": 16, "cuda": 200}
PROGRESS_SECONDS = 10.0


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
        "--distances", type=_distances, metavar="LIST",
        help="tokens over which to remember, such as 1024,4096; `none` leaves needles out (default up to 4,096 on a "
        "CPU, 65,536 on a GPU)",
    )  # fmt: skip
    parser.add_argument(
        "--trials", type=positive_int, metavar="INT", help="at each distance (default 16 on a CPU, 200 on a GPU)"
    )
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
        raise wrong_argument("{text!r} is not NAME=PATH", text=text)
    return name, Path(path)


def _distances(text: str) -> list[int]:
    if text == "none":
        return []
    try:
        distances = [int(one) for one in text.split(",")]
    except ValueError:
        distances = [-1]
    if min(distances) < 0:
        raise wrong_argument("{text!r} is not a list of whole numbers separated by commas", text=text)
    return sorted(set(distances))


def _evaluate(options: argparse.Namespace) -> int:
    from mm_rec.evaluation.lm_eval import run_harness
    from mm_rec.evaluation.recall import Haystack, cells, find_needles
    from mm_rec.evaluation.report import Measurements, write_report
    from mm_rec.inference.chat_session import QUESTIONS, ChatSession, transcript
    from mm_rec.inference.loading import load_model
    from mm_rec.storage.files import reporting_errors

    loaded = load_model(options.model, device=options.device, precision=options.precision, weights=options.weights)
    model, tokenizer, domain = loaded.model, loaded.tokenizer, loaded.choose_domain(options.domain)
    with reporting_errors(options.output):  # before hours of measuring
        options.output.mkdir(parents=True, exist_ok=True)
    device = model.embedding.weight.device.type
    options.distances = DISTANCES[device] if options.distances is None else options.distances
    options.trials = options.trials or TRIALS[device]
    measured = Measurements(_facts(loaded, domain))
    print(translate("state: {state}", state=measured.model["state"]))
    documents = {
        name: _read_documents(path, loaded, options.max_bytes, options.skip_bad) for name, path in options.documents
    }
    haystack = next((Haystack(one.tokens, tokenizer) for one in documents.values()), None)
    needles = cells(options.distances, haystack)
    costs = _costs(loaded, domain, documents, options.trials, [distance for _, distance in needles])
    clock = _Clock(costs)
    _read(loaded, documents, measured, clock.counting(costs.reading))
    for kind, distance in needles:
        measured.needles.append(
            find_needles(
                model, tokenizer, domain, kind, distance, haystack,
                trials=options.trials, seed=options.seed, progress=clock.counting(costs.needles),
            )
        )  # fmt: skip
        print(_needles_in_words(measured.needles[-1]), flush=True)
    too_far = [one for one in options.distances if haystack is not None and not haystack.holds(one)]
    if too_far:
        print(
            translate(
                "the documents have too few tokens for needles over {distances}",
                distances=", ".join(f"{one:,}" for one in too_far),
            )
        )
    if options.tasks:
        measured.tasks = run_harness(
            loaded.path, options.tasks.split(","), task_dir=options.task_dir, domain=domain, limit=options.limit,
            device=str(model.embedding.weight.device), precision=measured.model["precision"],
        )  # fmt: skip
        for task, numbers in measured.tasks.items():
            print(f"{task}: " + ", ".join(f"{name} {value:.4f}" for name, value in numbers.items()))
    measured.conversation = transcript(ChatSession.start(model, tokenizer, domain=domain), QUESTIONS)
    print(translate("report in {path}", path=write_report(options.output, measured)))
    return 0


class _Costs(NamedTuple):
    """Tokens to read in documents, once for each expert that reads them, and in needles; seconds for each token."""

    tokens_of_documents: int
    tokens_of_needles: int
    reading: float
    needles: float


def _costs(
    loaded: Loaded, domain: str | None, documents: Mapping[str, Documents], trials: int, distances: list[int]
) -> _Costs:
    """Measure how long a piece of a document and of a needle's row takes; ``distances`` are those of all needles."""
    import torch

    from mm_rec.evaluation import bits_per_byte, recall

    model = loaded.model
    device, experts = model.embedding.weight.device, model.config.experts

    @torch.inference_mode()
    def seconds_per_token(rows: int, tokens: int, domain: str | None) -> float:
        ids = torch.zeros(rows, tokens, dtype=torch.int64, device=device)
        for _ in range(2):  # the first time takes longer
            start = time.monotonic()
            model(ids, None, domain, targets=ids)
            if device.type == "cuda":
                torch.cuda.synchronize()
        return (time.monotonic() - start) / ids.numel()

    # Each expert reads every document, and all of them once more to be fused.
    readings = 2 * len(experts) if len(experts) > 1 else 1
    of_documents = readings * sum(len(tokens) for one in documents.values() for tokens in one.tokens)
    of_needles = trials * sum(map(recall.row_tokens, distances))
    rows, tokens = recall.piece_of(trials, device)
    chunk = bits_per_byte.CHUNK
    return _Costs(
        of_documents,
        of_needles,
        seconds_per_token(bits_per_byte.TOKENS_PER_BATCH // chunk, chunk, experts[0]) if of_documents else 0.0,
        seconds_per_token(rows, tokens, domain) if of_needles else 0.0,
    )


class _Clock:
    """Tells before a long measurement how long it will take, and during it how much is left."""

    def __init__(self, costs: _Costs) -> None:
        reading, needles = costs.tokens_of_documents * costs.reading, costs.tokens_of_needles * costs.needles
        self._total, self._done = reading + needles, 0.0
        self._start = self._said = time.monotonic()
        if self._total:
            print(
                translate(
                    "reading takes about {total}: {reading} for documents, {needles} for needles",
                    total=_in_words(self._total),
                    reading=_in_words(reading),
                    needles=_in_words(needles),
                ),
                flush=True,
            )

    def counting(self, seconds_per_token: float) -> Callable[[int], None]:
        """Returns what is to be called with the number of tokens of each piece that was read."""

        def add(tokens: int) -> None:
            self._done += tokens * seconds_per_token
            now = time.monotonic()
            if now - self._said > PROGRESS_SECONDS and self._done:
                self._said = now
                left = (self._total / self._done - 1) * (now - self._start)
                print(
                    translate(
                        "  {done:.0%}, about {left} to go",
                        done=min(self._done / self._total, 1),
                        left=_in_words(max(left, 0)),
                    ),
                    flush=True,
                )

        return add


def _read(
    loaded: Loaded, documents: Mapping[str, Documents], measured: Measurements, progress: Callable[[int], None]
) -> None:
    """Bits per byte of every set, by each expert and by all fused, whole and by position."""
    import numpy as np

    from mm_rec.evaluation.bits_per_byte import bytes_by_position, evaluate

    experts = loaded.model.config.experts
    token_bytes = np.array([len(one) for one in loaded.tokenizer.token_bytes])
    for name, one in documents.items():
        sizes = bytes_by_position(one, token_bytes)
        measured.bits_per_byte[name], measured.by_position[name] = {}, {}
        for reader in (*experts, None) if len(experts) > 1 else experts:
            runs = 1 if reader else len(experts)
            score = evaluate(loaded.model, one, reader, progress=partial(_times, progress, runs))
            measured.bits_per_byte[name][reader or "fused"] = score.bits_per_byte
            measured.by_position[name][reader or "fused"] = [
                bits / size if size else None for bits, size in zip(score.bits_by_position, sizes, strict=True)
            ]
        scores = ", ".join(f"{reader} {score:.4f}" for reader, score in measured.bits_per_byte[name].items())
        print(translate("{name}: bits per byte by {scores}", name=name, scores=scores), flush=True)


def _times(progress: Callable[[int], None], runs: int, tokens: int) -> None:
    """Tell of tokens that so many experts read."""
    progress(runs * tokens)


def _needles_in_words(found: Needles) -> str:
    return translate(
        "needle, {kind}, over {distance:,} tokens: {accuracy:.1%} right ({low:.0%} to {high:.0%}, {chance:.0%} by "
        "chance), {free:.1%} in free answers",
        kind=found.kind,
        distance=found.distance,
        accuracy=found.accuracy,
        low=found.low,
        high=found.high,
        chance=found.chance,
        free=found.free / found.trials,
    )


def _in_words(seconds: float) -> str:
    from mm_rec.training.console import describe_seconds

    return describe_seconds(seconds)


def _facts(loaded: Loaded, domain: str | None) -> dict[str, str]:
    """What was measured, in words."""
    import torch

    from mm_rec.evaluation.recall import state_bytes

    config, weight = loaded.model.config, loaded.model.embedding.weight
    precision = "bf16" if weight.dtype == torch.bfloat16 else "fp32"
    count = sum(parameter.numel() for parameter in loaded.model.parameters())
    experts = "1 expert" if len(config.experts) == 1 else f"{len(config.experts)} experts"
    whole, one = state_bytes(loaded.model), state_bytes(loaded.model, config.experts[0])
    return {
        "checkpoint": str(loaded.path),
        "parameters": f"{count / 1e6:.1f} million",
        "shape": f"{experts} of {config.n_layers} blocks, {config.d_model} wide",
        "vocabulary": f"{loaded.tokenizer.vocab_size:,} tokens",
        "answers by": domain or "all experts, fused",
        "precision": precision + (", int8" if loaded.weights == "int8" else ""),
        "state": Translatable(
            "{whole:,.0f} kB of a text read by all experts, {one:,.0f} kB by one", whole=whole / 1000, one=one / 1000
        ),
        "device": str(weight.device),
    }


def _read_documents(path: Path, loaded: Loaded, max_bytes: int | None, skip_bad: int) -> Documents:
    """The documents at ``path`` as tokens, of each no more than a part if there is a cap."""
    import numpy as np

    from mm_rec.data.documents.account import count_kinds, table
    from mm_rec.data.documents.folder import find_documents
    from mm_rec.data.documents.parsing import Parser
    from mm_rec.data.documents.reading import Documents as Reader
    from mm_rec.data.documents.reading import ReadOptions
    from mm_rec.data.pack import Document, write_store
    from mm_rec.evaluation.bits_per_byte import select_documents

    tokenizer = loaded.tokenizer
    found = find_documents(path)
    with tempfile.TemporaryDirectory() as folder, Parser(Path(folder)) as parser:
        reader = Reader(found.paths, parser, ReadOptions(skip_bad=skip_bad))
        texts = (document.text for document in reader.read() if document.text)
        documents = (Document([tokenizer.bos_id, *tokenizer.encode(text)], len(text.encode())) for text in texts)
        try:
            store = write_store(Path(folder) / "documents", documents, vocab_size=tokenizer.vocab_size)
        except ValueError as error:
            raise UserError("there are no documents in {path}", path=path) from error
        token_bytes = np.array([len(one) for one in tokenizer.token_bytes])
        chosen = select_documents(store, token_bytes, max_bytes)
        del store  # whose folder can't be removed on Windows while it is open
    for line in table(str(path), count_kinds(reader), [*found.left_out, *reader.left_out.values()], []):
        print(line)
    if reader.bad_rows:
        print(
            translate(
                "{path}: {count} bad rows left out, the first: {first}",
                path=path,
                count=len(reader.bad_rows),
                first=reader.bad_rows[0],
            )
        )
    if not chosen.tokens:
        raise UserError(
            "--max_bytes {max_bytes} leaves nothing of the documents in {path}", max_bytes=max_bytes, path=path
        )
    return chosen


if __name__ == "__main__":
    raise SystemExit(run_program(main))
