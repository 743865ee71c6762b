"""From nothing to a model that answers: data, pre-training, instruct, chat, then five questions with its answers.

All data is real text, code, questions and answers of this machine's own Python installation, so no network is needed.
The same command again goes on where it was stopped.
"""

from __future__ import annotations

import dataclasses
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from mm_rec.options import Option, add_arguments, from_arguments
from mm_rec.program import Parser, run_program, say
from mm_rec.training.settings import TrainSettings
from mm_rec.translation import Translatable

if TYPE_CHECKING:
    from rich.console import Console

    from mm_rec.data.prepared import Prepared
    from mm_rec.evaluation.answers import Question
    from mm_rec.machine.signals import SignalGuard
    from mm_rec.training.recipe import Recipe

EPILOG = """
examples:
  mm-rec demo
  mm-rec demo --minutes 60 --folder better      learns more
  MM_REC_MAX_STEPS=20 mm-rec demo               goes through everything in a minute or two and learns nothing

The guide's first command, which trains the 100M model on downloaded data, is python3 -m mm_rec.scripts.auto_train.
"""

TRAINING_SHARE = 0.75
"""Share of the time that is spent in the stages; the rest is for the data, saving and the questions."""

DISK = "1 GB"
HELD_OUT, ASKED = 100, 5
"""Questions that `benchmarks/answers.py` draws, and the first of them, which are asked here."""


@dataclass(frozen=True)
class DemoSettings:
    """What ``mm-rec demo`` takes."""

    folder: Annotated[Path, Option("where everything goes: data and runs")] = Path("demo")
    minutes: Annotated[float, Option("time that all of it may take", minimum=1, maximum=1e6)] = 20.0
    device: Annotated[str, Option("cpu, cuda, or auto: CUDA if it is there")] = "auto"
    precision: Annotated[str, Option("type of the matrices", choices=("auto", "bf16", "fp32"))] = "auto"
    threads: Annotated[int | None, Option("CPU threads; if not given, as many as pay here", minimum=1)] = None


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    """Parse arguments and run the demo."""
    parser = Parser(prog=prog, description=__doc__, epilog=EPILOG)
    add_arguments(parser, DemoSettings)
    return run(from_arguments(DemoSettings, parser.parse_args(arguments)))


def run(settings: DemoSettings) -> int:
    """Run the demo; returns the exit code."""
    from mm_rec import processes
    from mm_rec.evaluation.answers import draw_questions
    from mm_rec.machine.signals import SignalGuard
    from mm_rec.training.recipe import Recipe, recipe_data

    start = time.monotonic()
    recipe = Recipe()
    base = TrainSettings(
        data_dir=settings.folder / "data",
        checkpoint_dir=settings.folder / "runs",
        minutes=TRAINING_SHARE * settings.minutes,
        device=settings.device,
        precision=settings.precision,
        threads=settings.threads,
    )
    console = processes.make_console()
    say(
        console,
        Translatable(
            "this takes at most {minutes:g} minutes and {disk} of disk, all of it in {folder}; Ctrl-C stops it, and "
            "the same command goes on",
            minutes=settings.minutes,
            disk=DISK,
            folder=settings.folder,
        ),
    )
    with SignalGuard() as guard:
        data = recipe_data(recipe, base, console)
        questions = draw_questions(base.data_dir / "questions" / "builtin.jsonl", HELD_OUT)[:ASKED]
        model = _train(recipe, base, data, guard, console)
        guard.check()
        _ask(model, questions, settings, console)
    say(console, Translatable("done in {minutes:.1f} minutes", minutes=(time.monotonic() - start) / 60))
    say(console, Translatable("talk to it: mm-rec chat --model {path} --temperature 0", path=base.checkpoint_dir))
    return 0


def _train(recipe: Recipe, base: TrainSettings, data: Prepared, guard: SignalGuard, console: Console) -> Path:
    """Train the stages of the recipe, each from the one before; returns the final checkpoint."""
    from mm_rec.stages import STAGES
    from mm_rec.training.recipe import train_stage

    path: Path | None = None
    steps = [recipe.settings(stage, base) for stage in recipe.stages]
    for at, one in enumerate(steps):
        guard.check()
        left = sum(later.minutes or 0.0 for later in steps[at:])
        say(
            console,
            Translatable(
                "\nstep {number} of {count}, {stage} ({summary}): {minutes:.0f} of the {left:.0f} minutes of training "
                "that are left",
                number=at + 1,
                count=len(steps),
                stage=one.stage,
                summary=Translatable(STAGES[one.stage].summary),
                minutes=one.minutes,
                left=left,
            ),
        )
        path = train_stage(dataclasses.replace(one, init_from=path), data, guard, console)
    assert path is not None, "a recipe has stages"
    return path


def _ask(model: Path, questions: Sequence[Question], settings: DemoSettings, console: Console) -> None:
    """Ask questions about what was held out from training, and print the answers."""
    from mm_rec.evaluation.answers import answer, token_f1
    from mm_rec.inference.loading import load_model

    loaded = load_model(model, device=settings.device, precision=settings.precision)
    line = Translatable(
        "\n{count} questions about things that it was never asked about in training:", count=len(questions)
    )
    say(console, line)
    for number, question in enumerate(questions, 1):
        said = "".join(answer(loaded, question.text)).strip()
        score = token_f1(said, question.answer)
        say(
            console,
            Translatable(
                "\n{number}. {question}\n   answer: {said}\n   right would be: {answer} (word F1 {score:.2f})",
                number=number,
                question=textwrap.indent(question.text, "   ").lstrip(),
                said=said,
                answer=question.answer,
                score=score,
            ),
        )


if __name__ == "__main__":
    raise SystemExit(run_program(main))
