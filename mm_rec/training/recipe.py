"""The recipe of a small model that answers questions: pre-training, then instruct, then chat, in one budget.

All text is one domain, so that the model has one expert: half the memory and the time of two, and nothing to fuse. Some
of the questions with answers stand in the text of pre-training, too. Shares and rates are those that answered best of
what `benchmarks/answers.py` measured (docs/LOG.md).
"""

from __future__ import annotations

import dataclasses
import functools
import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from mm_rec.config import PRESETS
from mm_rec.data.download_data import Request, download
from mm_rec.data.prepare import prepare
from mm_rec.data.prepared import Prepared
from mm_rec.machine.signals import SignalGuard
from mm_rec.program import say
from mm_rec.stages import STAGES
from mm_rec.storage.files import write_atomic
from mm_rec.training.finetune import finetune
from mm_rec.training.run_stages import train_stages
from mm_rec.training.settings import TrainSettings

__all__ = ["Recipe", "StageShare", "recipe_data", "train_stage"]

DOMAIN = "builtin"
PLAIN = "pairs"
"""Folder of the pairs that are pre-trained on as text."""


class StageShare(NamedTuple):
    """A stage of a recipe: its share of the budget, and its peak learning rate."""

    name: str
    share: float
    rate: float


@dataclass(frozen=True)
class Recipe:
    """What is trained and how.

    Attributes:
        preset: size of the model.
        text_samples, code_samples: documents and modules of what is installed to pre-train on.
        plain_pairs: questions with answers that stand in the text of pre-training.
        stages: the stages, in their order.
        batch_size, seq_len: rows of a micro-batch and tokens of a row.
    """

    preset: str = "small"
    text_samples: int = 2500
    code_samples: int = 400
    plain_pairs: int = 10_000
    stages: tuple[StageShare, ...] = (
        StageShare("stage1", 0.3, 2e-3),
        StageShare("instruct", 0.6, 2e-3),
        StageShare("chat", 0.1, 5e-4),
    )
    batch_size: int = 2
    seq_len: int = 512

    def settings(self, stage: StageShare, base: TrainSettings, tokens: int | None = None) -> TrainSettings:
        """Returns the settings of one stage.

        Args:
            stage: one of :attr:`stages`.
            base: the folders, the device and the like; its ``minutes`` are those of all stages.
            tokens: how many to read in all stages, in place of a time.
        """
        share = stage.share / sum(one.share for one in self.stages)
        steps = None if tokens is None else max(1, round(share * tokens / (self.batch_size * self.seq_len)))
        return dataclasses.replace(
            base,
            stage=stage.name,
            preset=self.preset,
            batch_size=self.batch_size,
            seq_len=self.seq_len,
            lr=stage.rate / STAGES[stage.name].rate_factor,
            max_steps=steps,
            minutes=None if base.minutes is None or tokens is not None else share * base.minutes,
            keep_checkpoints=1,
        )


def recipe_data(recipe: Recipe, settings: TrainSettings, console: Console) -> Prepared:
    """Returns the text of pre-training, ready to be trained on; what is there already is used again.

    Conversations to learn from and questions to test with lie beside it in ``settings.data_dir``.
    """
    tell = functools.partial(say, console)
    folder = settings.data_dir
    download(
        folder, Request({"text": recipe.text_samples, "code": recipe.code_samples}, sources=("builtin",)), tell=tell
    )
    _write_plain_pairs(folder, recipe.plain_pairs)
    return prepare(
        folder,
        settings.vocab_size or PRESETS[recipe.preset].vocab_size,
        filters=False,  # what is installed is read by rules of its own
        folders={DOMAIN: folder},
        cache=folder / "prepared",
        skip=[folder / name for name in ("instruct", "chat", "questions", "prepared", "manifest.json")],
        progress=tell,
    )


def _write_plain_pairs(folder: Path, count: int) -> None:
    """Write the first pairs to train on as documents of text."""
    texts = []
    with (folder / "instruct" / "builtin.jsonl").open(encoding="utf-8") as file:
        for line in islice(file, count):
            question, answer = (message["content"] for message in json.loads(line)["messages"])
            texts.append(json.dumps(f"{question}\n\n{answer}", ensure_ascii=False) + "\n")
    target = folder / PLAIN / "builtin.jsonl"
    target.parent.mkdir(exist_ok=True)
    write_atomic(target, "".join(texts).encode())


def train_stage(settings: TrainSettings, data: Prepared, guard: SignalGuard, console: Console) -> Path:
    """Trains one stage of a recipe, or finds it finished; returns its final checkpoint."""
    if STAGES[settings.stage].conversations:
        return finetune(settings, settings.data_dir / settings.stage, guard, console)
    return train_stages(settings, data, guard, console)
