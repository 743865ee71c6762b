"""Fine-tuning on conversations: data for the model's own tokenizer, then the one trainer."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from mm_rec.data.prepare_conversations import prepare_conversations
from mm_rec.errors import UserError
from mm_rec.machine.signals import SignalGuard
from mm_rec.program import say
from mm_rec.storage import checkpoint
from mm_rec.text.tokenizer import Tokenizer
from mm_rec.training.check_settings import check_settings
from mm_rec.training.initial_weights import starting_checkpoint
from mm_rec.training.run_stages import train_stages
from mm_rec.training.settings import TrainSettings

__all__ = ["conversations_of", "finetune"]


def conversations_of(task: str, data: Path | None, data_dir: Path) -> Path:
    """Where the conversations of a task are: what the user names, else the folder TASK of the data folder.

    Raises:
        UserError: if there is nothing.
    """
    path = data or data_dir / task
    if not path.exists():
        source = {"instruct": "alpaca", "chat": "ultrachat"}[task]
        raise UserError(
            f"there are no conversations for {task} in {path}; name a file or folder of your own, make questions from "
            f"documents with `mm-rec finetune --pairs_from DIR`, or get some with `mm-rec data --source {source} "
            f"--output_dir {data_dir}`, offline with --source builtin"
        )
    return path


def finetune(settings: TrainSettings, conversations: Path, guard: SignalGuard, console: Console) -> Path:
    """Train ``settings.stage``, one of ``FINETUNING``, on conversations; returns the final checkpoint.

    Args:
        settings: of the stage; the model is that of ``init_from``, or of the stage before.
        conversations: a data file or a folder of them.
        guard: of signals.
        console: to print on.

    Raises:
        UserError: if something does not fit: the data, the memory, the disk or an earlier run.
        Interrupted: after a signal, with everything saved.
    """
    check_settings(settings, [settings.stage])
    one = settings.for_stage(settings.stage)
    start = checkpoint.resolve(one.resume_from) if one.resume_from else starting_checkpoint(one)
    assert start is not None, "fine-tuning follows another stage"
    data = prepare_conversations(
        conversations,
        Tokenizer.load(start),
        name=one.stage,
        cache=one.checkpoint_dir / "prepared",
        max_samples=one.max_samples,
        skip_bad=one.skip_bad,
        progress=lambda line: say(console, line),
    )
    return train_stages(one, data, guard, console)
