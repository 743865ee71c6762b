"""Teach a trained model to follow instructions or to chat; the loss counts the assistant's answers only.

The same command again goes on with a run that was stopped.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from mm_rec.options import Option, add_arguments, from_arguments
from mm_rec.program import Parser, run_program, say
from mm_rec.stages import FINETUNING
from mm_rec.training.settings import MODEL_SHAPE, TrainSettings

EPILOG = """
conversations are read from .json, .jsonl (plain, .gz, .zst, .xz) and .parquet; the format follows from the rows:
  Alpaca             {"instruction": ..., "input": ..., "output": ...}
  ShareGPT           {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}
  OpenAI messages    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}
  prompt/completion  {"prompt": ..., "completion": ...}

examples:
  mm-rec finetune --task instruct --data alpaca.jsonl --checkpoint_dir ./checkpoints
  mm-rec finetune --task chat --data ./my_chats --checkpoint_dir ./checkpoints --skip_bad 20
  mm-rec finetune --task instruct --data alpaca.jsonl --init_from ./checkpoints/stage1
  mm-rec finetune --task instruct --pairs_from ./documents --checkpoint_dir ./checkpoints
  mm-rec finetune --pairs_from ./documents --preview      shows questions and trains nothing

With --pairs_from questions are made from documents of your own: from headings, definitions, questions with answers, and
the functions and docstrings of Python modules. An answer is copied from the document. They are kept in the folder pairs
of --checkpoint_dir, with some about other things in held_out.jsonl, which are not trained on.
"""

NOT_HERE = (
    "stage", "preset", *MODEL_SHAPE, "download_data", "language", "use_synthetic", "recall_share", "text_dir",
    "code_dir", "domain", "encoding", "columns", "list",
)  # fmt: skip
"""Settings of pre-training that the model brings along or that mean nothing to conversations."""


@dataclass(frozen=True)
class FinetuneSettings(TrainSettings):
    """What ``mm-rec finetune`` takes."""

    task: Annotated[str, Option("what to teach", choices=FINETUNING)] = "instruct"
    data: Annotated[Path | None, Option("file or folder of conversations; the folder TASK of --data_dir")] = None
    pairs_from: Annotated[
        Path | None, Option("file or folder of documents to make questions and answers from, in place of --data")
    ] = None
    preview: Annotated[bool, Option("only show how many questions --pairs_from gives, and some of them")] = False


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    """Parse arguments and train."""
    parser = Parser(prog=prog, description=__doc__, epilog=EPILOG)
    add_arguments(parser, FinetuneSettings, without=NOT_HERE)
    settings = from_arguments(FinetuneSettings, parser.parse_args(arguments))

    if settings.pairs_from is not None and settings.data is not None:
        parser.error("--data and --pairs_from both say what to learn from; leave one of them out")
    if settings.preview and settings.pairs_from is None:
        parser.error("--preview shows the questions that are made with --pairs_from DIR")

    from mm_rec import processes
    from mm_rec.data.documents.reading import ReadOptions
    from mm_rec.data.questions.folder import preview, write_questions
    from mm_rec.machine.signals import SignalGuard
    from mm_rec.training.finetune import conversations_of, finetune

    with SignalGuard() as guard, processes.process_group(settings.device):
        console = processes.make_console()
        if settings.pairs_from is None:
            conversations = conversations_of(settings.task, settings.data, settings.data_dir)
        else:
            options = ReadOptions(skip_bad=settings.skip_bad)
            folder = settings.checkpoint_dir / "pairs"
            with processes.rank_zero_first():
                made = write_questions(settings.pairs_from, settings.task, folder, options, settings.seed)
            preview(made.questions, functools.partial(say, console))
            conversations = made.train
            if settings.preview:
                return 0
        finetune(dataclasses.replace(settings, stage=settings.task), conversations, guard, console)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_program(main))
