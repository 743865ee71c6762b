"""Teach a trained model to follow instructions or to chat; the loss counts the assistant's answers only.

The same command again goes on with a run that was stopped.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from mm_rec.options import Option, add_arguments, from_arguments
from mm_rec.program import Parser, run_program
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


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    """Parse arguments and train."""
    parser = Parser(prog=prog, description=__doc__, epilog=EPILOG)
    add_arguments(parser, FinetuneSettings, without=NOT_HERE)
    settings = from_arguments(FinetuneSettings, parser.parse_args(arguments))

    from mm_rec import processes
    from mm_rec.machine.signals import SignalGuard
    from mm_rec.training.finetune import conversations_of, finetune

    conversations = conversations_of(settings.task, settings.data, settings.data_dir)
    with SignalGuard() as guard, processes.process_group(settings.device):
        console = processes.make_console()
        finetune(dataclasses.replace(settings, stage=settings.task), conversations, guard, console)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_program(main))
