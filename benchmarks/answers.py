"""Questions that a small model answers after the recipe of `mm-rec demo`, beside the same model before instruct.

The recipe trains on what is installed on this machine, or on what is prepared in DIR, and is then asked 100 questions
about entries that were held out, half of them with a passage at hand and half from memory. What counts is token F1 as
SQuAD defines it, and the share of questions with at least 0.5.

    python -m benchmarks.answers --data DIR --tokens 6e6
    python -m benchmarks.answers --data DIR --tokens 6e6 --device cuda --shares 0.4 0.5 0.1 --rates 2e-3 2e-3 5e-4
    python -m benchmarks.answers --data DIR --minutes 15 --threads 2

DIR is made if it is not there (`mm-rec data --source builtin --output_dir DIR` is a part of it). Runs of equal settings
in one folder of --runs go on where they were.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mm_rec import processes
from mm_rec.evaluation.answers import (
    Question,
    answer,
    continue_question,
    draw_questions,
    share_of_good,
    token_f1,
)
from mm_rec.inference.loading import load_model
from mm_rec.machine.signals import SignalGuard
from mm_rec.storage import checkpoint
from mm_rec.training.recipe import Recipe, StageShare, recipe_data, train_stage
from mm_rec.training.settings import TrainSettings

RESULT = Path(__file__).parent / "results" / "answers" / "cpu.json"
QUESTIONS, SEED = 100, 0


def ask(path: Path, questions: Sequence[Question], *, is_base: bool, device: str) -> list[dict[str, Any]]:
    """Ask the model at ``path``; a base model continues the question, as it knows no conversation."""
    loaded = load_model(path, device=device)
    say = continue_question if is_base else answer
    rows = []
    for question in questions:
        said = "".join(say(loaded, question.text)).strip()
        f1 = round(token_f1(said, question.answer), 4)
        rows.append({"sort": question.sort, "kind": question.kind, "said": said, "f1": f1})
    return rows


def summarize(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The share of answers with a good F1 in all, by sort, and by sort and kind."""
    groups: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        for name in ("all", row["sort"], f"{row['sort']} {row['kind']}"):
            groups[name].append(row["f1"])
    return {name: round(share_of_good(scores), 3) for name, scores in sorted(groups.items())}


def main(argv: list[str] | None = None) -> int:
    """Train the recipe, ask, print the shares and write the JSON."""
    default = Recipe()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="data folder, made if it is not there")
    parser.add_argument("--runs", type=Path, metavar="DIR", help="keep the runs there; a temporary folder if not given")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--tokens", type=float, help="that all stages read together")
    budget.add_argument("--minutes", type=float, help="that all stages take together")
    parser.add_argument("--preset", default=default.preset)
    parser.add_argument(
        "--shares", type=float, nargs=3, default=[one.share for one in default.stages], help="of the stages"
    )
    parser.add_argument("--rates", type=float, nargs=3, default=[one.rate for one in default.stages], help="peak rates")
    parser.add_argument("--batch_size", type=int, default=default.batch_size)
    parser.add_argument("--seq_len", type=int, default=default.seq_len)
    parser.add_argument("--plain_pairs", type=int, default=default.plain_pairs, help="pairs in the pre-training text")
    parser.add_argument("--text_samples", type=int, default=default.text_samples, help="documents to pre-train on")
    parser.add_argument("--code_samples", type=int, default=default.code_samples, help="modules to pre-train on")
    parser.add_argument("--optimizer", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ask_device", default="cpu", help="where the model answers; the CPU reads a token at a time")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--questions",
        type=int,
        default=QUESTIONS,
        help="to ask; those after the first hundred, by which no recipe was chosen, are counted apart",
    )
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args(argv)
    recipe = Recipe(
        preset=options.preset,
        text_samples=options.text_samples,
        code_samples=options.code_samples,
        plain_pairs=options.plain_pairs,
        stages=tuple(
            StageShare(one.name, share, rate)
            for one, share, rate in zip(default.stages, options.shares, options.rates, strict=True)
            if share
        ),
        batch_size=options.batch_size,
        seq_len=options.seq_len,
    )
    with tempfile.TemporaryDirectory() as temporary, SignalGuard() as guard:
        settings = TrainSettings(
            data_dir=options.data,
            checkpoint_dir=options.runs or Path(temporary),
            minutes=options.minutes,
            optimizer=options.optimizer,
            device=options.device,
            threads=options.threads,
            seed=options.seed,
        )
        result = run(recipe, settings, None if options.tokens is None else int(options.tokens), options, guard)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps({name: result[name] for name in ("stages", "base", "shares", "shares_of_others")}, indent=1))
    return 0


def run(
    recipe: Recipe, settings: TrainSettings, tokens: int | None, options: argparse.Namespace, guard: SignalGuard
) -> dict[str, Any]:
    """Train every stage and ask before and after the conversations."""
    console = processes.make_console()
    data = recipe_data(recipe, settings, console)
    questions = draw_questions(settings.data_dir / "questions" / "builtin.jsonl", options.questions, SEED)
    stages: dict[str, dict[str, float]] = {}
    paths: list[Path] = []
    for stage in recipe.stages:
        one = recipe.settings(stage, settings, tokens)
        start = time.perf_counter()
        path = train_stage(dataclasses.replace(one, init_from=paths[-1] if paths else None), data, guard, console)
        position = checkpoint.load(path).trainer["position"]
        seconds = round(time.perf_counter() - start, 1)
        stages[stage.name] = {"seconds": seconds, "steps": position["step"], "tokens": position["tokens"]}
        paths.append(path)
    base = ask(paths[0], questions, is_base=True, device=options.ask_device)
    taught = ask(paths[-1], questions, is_base=False, device=options.ask_device)
    asked = [
        {
            **question._asdict(),
            "said": after["said"],
            "f1": after["f1"],
            "base_said": first["said"],
            "base_f1": first["f1"],
        }
        for question, first, after in zip(questions, base, taught, strict=True)
    ]
    return {
        "recipe": {**dataclasses.asdict(recipe), "stages": [one._asdict() for one in recipe.stages]},
        "budget": {"tokens": tokens, "minutes": settings.minutes},
        "device": settings.device if settings.device == "cpu" else torch.cuda.get_device_name(),
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "stages": stages,
        "base": summarize(base[:QUESTIONS]),
        "shares": summarize(taught[:QUESTIONS]),
        "shares_of_others": summarize(taught[QUESTIONS:]),
        "questions": asked,
    }


if __name__ == "__main__":
    raise SystemExit(main())
