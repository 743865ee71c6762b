"""Measure a model: bits per byte, how far back it remembers, tasks of lm-eval. Writes a page with pictures.

Bits per byte say how well a model predicts a text: how many bits it needs, on average, to tell each byte of it. Fewer
are better; a model that knows nothing needs 8.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mm_rec.errors import UserError
from mm_rec.program import Parser, positive_int, run_program, wrong_argument
from mm_rec.scripts.eval_clock import (
    Clock,
    choose_distances,
    measure_speeds,
    readers,
    tokens_of_needles,
    tokens_to_read,
)
from mm_rec.scripts.sampling_options import MODEL_HELP, add_domain_argument, add_weights_argument
from mm_rec.translation import Translatable, translate

if TYPE_CHECKING:
    from mm_rec.evaluation.bits_per_byte import Documents
    from mm_rec.evaluation.recall import Needles
    from mm_rec.evaluation.report import Measurements
    from mm_rec.inference.loading import Loaded

EPILOG = """examples:
  mm-rec eval --model checkpoints_cpu
  mm-rec eval --model checkpoints_cpu --distances 1024,16384 --trials 50
  mm-rec eval --model checkpoints_cpu --documents books=books.jsonl --documents code=python.jsonl.xz
  mm-rec eval --model checkpoints_cpu --tasks arc_easy,lambada_openai --limit 200

Without --documents the model reads what its run held out, the same as training validates on. Documents that are named
are compared with the training data, paragraph by paragraph, and what was seen in training is told apart. They are .txt,
.jsonl (plain, .gz, .zst, .xz), .parquet and more, a file or a folder. Each expert reads them and, once fusion is
trained, all fused. Needles (something said once, and asked for many tokens later) are hidden in the first set; without
one only a pass key is, in a text of a few sentences. Tasks need the extra `eval`.
"""

TRIALS = {"cpu": 16, "cuda": 200}


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    """Parse arguments, measure, write the report."""
    parser = Parser(prog=prog, description=__doc__, epilog=EPILOG)
    parser.add_argument("--model", type=Path, required=True, help=MODEL_HELP)
    parser.add_argument("--output", type=Path, default=Path("evaluation"), metavar="FOLDER", help="for the report")
    parser.add_argument(
        "--documents",
        action="append",
        default=[],
        type=_named_path,
        metavar="NAME=PATH",
        help="to read in place of what the run held out; may be repeated",
    )
    parser.add_argument(
        "--max_bytes", type=positive_int, metavar="INT",
        help="of each set of documents (default: all of named ones; of held-out ones as many as training validates on)",
    )  # fmt: skip
    parser.add_argument(
        "--skip_bad", type=int, default=0, metavar="INT", help="rows that cannot be read to leave out of each set"
    )
    parser.add_argument(
        "--distances", type=_distances, metavar="LIST",
        help="tokens over which to remember, such as 1024,4096; `none` leaves needles out (default: what takes a "
        "minute, up to 4,096 on a CPU, 65,536 on a GPU)",
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
    trials = options.trials or TRIALS[model.embedding.weight.device.type]
    measured = Measurements(_facts(loaded, domain))
    print(translate("state: {state}", state=measured.model["state"]))
    documents = _choose_documents(options, loaded, measured)
    haystack = next((Haystack(one.tokens, tokenizer) for one in documents.values() if one.masks is None), None)
    speeds = measure_speeds(loaded, domain, trials)
    distances = choose_distances(options.distances, loaded, haystack, trials, speeds.needles)
    needles = cells(distances, haystack)
    clock = Clock(
        speeds.reading * tokens_to_read(loaded, documents),
        speeds.needles * tokens_of_needles(trials, [distance for _, distance in needles]),
    )
    _read(loaded, documents, measured, clock.counting(speeds.reading))
    for kind, distance in needles:
        measured.needles.append(
            find_needles(
                model, tokenizer, domain, kind, distance, haystack,
                trials=trials, seed=options.seed, progress=clock.counting(speeds.needles),
            )
        )  # fmt: skip
        print(_needles_in_words(measured.needles[-1]), flush=True)
    too_far = [one for one in distances if haystack is not None and not haystack.holds(one)]
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


def _choose_documents(options: argparse.Namespace, loaded: Loaded, measured: Measurements) -> dict[str, Documents]:
    """The sets of documents to read, and in ``measured`` where each is from and what of it was seen in training."""
    from mm_rec.evaluation.document_sets import held_out, read_documents

    tokenizer = loaded.tokenizer
    if options.documents:
        named = {
            name: read_documents(path, tokenizer, options.max_bytes, options.skip_bad, _tell)
            for name, path in options.documents
        }
        return _tell_apart(named, loaded, measured)
    try:
        documents, data = held_out(loaded.path, tokenizer, options.max_bytes)
    except UserError as error:
        print(
            translate("no held-out documents are read: {problem}; name some with --documents NAME=PATH", problem=error)
        )
        return {}
    print(translate("held-out documents of {path}, which training has not seen:", path=data.path))
    for name, one in documents.items():
        size = Translatable(
            "{count:,} documents, {size:,} bytes"
            if one.masks is None
            else "{count:,} answers in conversations, {size:,} bytes",
            count=len(one.tokens),
            size=one.n_bytes,
        )
        measured.origin[name] = f"held out, {size}"
        print(translate("  {name}: {size}", name=name, size=size))
    return documents


def _tell(text: str) -> None:
    print(translate(text))


def _tell_apart(named: Mapping[str, Documents], loaded: Loaded, measured: Measurements) -> dict[str, Documents]:
    """The sets of documents and, of each that was seen in part, the rest as one more set."""
    from mm_rec.evaluation.document_sets import open_training_data
    from mm_rec.evaluation.seen_in_training import compare

    try:
        training = [store for data in open_training_data(loaded.path) for store in data.train.values()]
    except UserError as error:
        print(translate("nothing says whether these documents were seen in training: {problem}", problem=error))
        measured.origin = dict.fromkeys(named, "not compared with the training data")
        return dict(named)
    count = sum(store.n_tokens for store in training)
    print(translate("comparing with {count:,} tokens of training data", count=count), flush=True)
    sets: dict[str, Documents] = {}
    for name, documents in named.items():
        seen = compare(documents, training, loaded.tokenizer.token_bytes)
        sets[name], measured.origin[name] = documents, seen.describe()
        print(translate("{name}: {seen}", name=name, seen=seen.describe()))
        if seen.rest is not None:
            rest = f"{name}, unseen part"
            sets[rest], measured.origin[rest] = seen.rest, f"the paragraphs of {name} that training has not seen"
    return sets


def _read(
    loaded: Loaded, documents: Mapping[str, Documents], measured: Measurements, progress: Callable[[int], None]
) -> None:
    """Bits per byte of every set, by each expert and by all fused if that is trained, whole and by position."""
    from mm_rec.evaluation.bits_per_byte import bytes_by_position, evaluate

    experts = loaded.model.config.experts
    for name, one in documents.items():
        sizes = bytes_by_position(one, loaded.tokenizer.token_sizes)
        measured.bits_per_byte[name], measured.by_position[name] = {}, {}
        for reader in readers(loaded):
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


def _facts(loaded: Loaded, domain: str | None) -> dict[str, str]:
    """What was measured, in words."""
    import torch

    from mm_rec.evaluation.recall import state_bytes
    from mm_rec.evaluation.results_file import WEIGHTS_SHA256

    config, weight = loaded.model.config, loaded.model.embedding.weight
    precision = "bf16" if weight.dtype == torch.bfloat16 else "fp32"
    count = sum(parameter.numel() for parameter in loaded.model.parameters())
    experts = "1 expert" if len(config.experts) == 1 else f"{len(config.experts)} experts"
    whole, one = state_bytes(loaded.model), state_bytes(loaded.model, config.experts[0])
    return {
        "checkpoint": str(loaded.path),
        WEIGHTS_SHA256: loaded.sha256,
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


if __name__ == "__main__":
    raise SystemExit(run_program(main))
