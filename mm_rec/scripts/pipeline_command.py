"""The whole way from text to a model that chats: stages 1 to 3, then instruct, then chat.

The same command again goes on where it was stopped; what is finished is passed over.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from mm_rec.options import Option, add_arguments, from_arguments
from mm_rec.program import Parser, run_program, say
from mm_rec.stages import FINETUNING, PRETRAINING
from mm_rec.training.settings import TrainSettings, share_of_time
from mm_rec.translation import Translatable

if TYPE_CHECKING:
    from rich.console import Console

EPILOG = """
After pre-training, instruct and chat a conversation with the model is printed and kept in --checkpoint_dir.
Settings of single stages go into a file:

  preset: small
  max_steps: 1000
  stages:
    stage2: {max_steps: 250}
    instruct: {max_steps: 400, batch_size: 4}

examples:
  mm-rec pipeline --data_dir ./data --checkpoint_dir ./checkpoints
  mm-rec pipeline --minutes 60 --data_dir ./data
  mm-rec pipeline --config pipeline.yaml --instruct_data alpaca.jsonl --chat_data ./my_chats
"""

NOT_HERE = ("stage", "init_from", "resume_from", "allow_changes")
TRANSCRIPT_TOKENS = 80


@dataclass(frozen=True)
class PipelineSettings(TrainSettings):
    """What ``mm-rec pipeline`` takes."""

    stage: str = "all"
    instruct_data: Annotated[
        Path | None, Option("file or folder of instructions; --data_dir/instruct", shared=True)
    ] = None
    chat_data: Annotated[Path | None, Option("file or folder of conversations; --data_dir/chat", shared=True)] = None


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    """Parse arguments and run the pipeline."""
    parser = Parser(prog=prog, description=__doc__, epilog=EPILOG)
    add_arguments(parser, PipelineSettings, without=NOT_HERE)
    settings = from_arguments(PipelineSettings, parser.parse_args(arguments))
    return run(settings)


def run(settings: PipelineSettings) -> int:
    """Run the pipeline; returns the exit code."""
    from mm_rec import processes
    from mm_rec.machine.signals import SignalGuard
    from mm_rec.training.check_settings import check_settings
    from mm_rec.training.finetune import conversations_of, finetune
    from mm_rec.training.load_data import load_data
    from mm_rec.training.minutes import choose_preset
    from mm_rec.training.run_stages import train_stages

    named = {"instruct": settings.instruct_data, "chat": settings.chat_data}
    conversations = {task: conversations_of(task, named[task], settings.data_dir) for task in FINETUNING}
    with SignalGuard() as guard, processes.process_group(settings.device):
        check_settings(settings, (*settings.stage_names(), *FINETUNING))
        console = processes.make_console()
        settings = choose_preset(settings, console)
        path = train_stages(_timed(settings, PRETRAINING), load_data(settings, console), guard, console)
        if processes.is_rank_zero():
            _write_transcript("pretrain", path, settings, console)
        for task in FINETUNING:
            guard.check()
            one = dataclasses.replace(_timed(settings, (task,)), stage=task, init_from=path)
            path = finetune(one, conversations[task], guard, console)
            if processes.is_rank_zero():
                _write_transcript(task, path, settings, console)
    return 0


def _timed(settings: PipelineSettings, stages: tuple[str, ...]) -> PipelineSettings:
    """The settings for some stages, which take their part of the time."""
    if settings.minutes is None:
        return settings
    minutes = share_of_time(settings.minutes, stages, (*PRETRAINING, *FINETUNING))
    return dataclasses.replace(settings, minutes=minutes)


def _write_transcript(phase: str, path: Path, settings: TrainSettings, console: Console) -> None:
    """Talk with the model of a phase, print and keep what was said."""
    from mm_rec.inference.chat_session import QUESTIONS, ChatSession, transcript
    from mm_rec.inference.loading import load_model
    from mm_rec.inference.sampling import Sampling
    from mm_rec.storage.files import write_atomic

    model, tokenizer, domain, *_ = load_model(path, device=settings.device, precision=settings.precision)
    sampling = Sampling(max_new_tokens=TRANSCRIPT_TOKENS, seed=settings.seed)
    said = transcript(ChatSession.start(model, tokenizer, sampling=sampling, domain=domain), QUESTIONS)
    file = settings.checkpoint_dir / f"transcript_{phase}.txt"
    write_atomic(file, said.encode())
    say(
        console,
        Translatable("a conversation after {phase}, kept in {file}:\n{said}", phase=phase, file=file, said=said),
    )


if __name__ == "__main__":
    raise SystemExit(run_program(main))
