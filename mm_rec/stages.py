"""The training stages: one table. A stage is data; the trainer runs them all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["FINETUNING", "PRETRAINING", "STAGES", "Sizes", "Stage"]


@dataclass(frozen=True)
class Sizes:
    """Default sizes of a stage on one kind of device.

    Attributes:
        batch_size: B, rows of a micro-batch.
        seq_len: T, tokens of a row; in lane layouts the chunk after which the carried state is cut off.
        steps: optimizer steps.
        checkpoint_interval: steps between two checkpoints.
    """

    batch_size: int
    seq_len: int
    steps: int
    checkpoint_interval: int


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    Attributes:
        name: of the stage and of its run folder.
        summary: one line for people.
        layout: "windows" cuts the packed stream into independent rows; "lanes" reads documents in order
            with the state carried from one micro-batch to the next.
        mixed: rows of all domains in one micro-batch, all experts run and are fused.
        rate_factor: of the peak learning rate.
        document_limit: tokens after which a longer document is cut and starts afresh; None for no cut.
        fusion_first: share of the steps, at the start, in which the fusion alone learns, at the full peak rate.
        follows: the stage whose final weights this one starts from.
        cpu, gpu: default sizes.
        conversations: the data are conversations, in which only answers count, and all experts learn from them.
        recall_share: part of the tokens that are rows made to train recall, if the user does not say.
        time_share: of the stage, where several stages share a time; only its ratio to the others' counts.
    """

    name: str
    summary: str
    layout: Literal["windows", "lanes"]
    mixed: bool
    rate_factor: float
    document_limit: int | None
    fusion_first: float
    follows: str | None
    cpu: Sizes
    gpu: Sizes
    conversations: bool = False
    recall_share: float = 0.0
    time_share: float = 1.0

    @property
    def fuses(self) -> bool:
        """Whether it teaches several experts to work as one, which a model of one expert has no use for."""
        return self.mixed and not self.conversations

    def sizes(self, device_type: str) -> Sizes:
        """The defaults for a ``torch.device`` type."""
        return self.cpu if device_type == "cpu" else self.gpu


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(
            name="stage1",
            summary="local consistency: short windows, each domain to its own expert",
            layout="windows",
            mixed=False,
            rate_factor=1.0,
            document_limit=None,
            fusion_first=0.0,
            follows=None,
            cpu=Sizes(batch_size=2, seq_len=512, steps=1000, checkpoint_interval=50),
            gpu=Sizes(batch_size=8, seq_len=512, steps=10_000, checkpoint_interval=200),
            time_share=8.0,
        ),
        Stage(
            name="stage2",
            summary="global specialisation: long documents, state carried, each domain to its own expert",
            layout="lanes",
            mixed=False,
            rate_factor=1 / 3,
            document_limit=8192,
            fusion_first=0.0,
            follows="stage1",
            cpu=Sizes(batch_size=2, seq_len=512, steps=250, checkpoint_interval=50),
            gpu=Sizes(batch_size=4, seq_len=8192, steps=5000, checkpoint_interval=100),
            recall_share=0.05,
        ),
        Stage(
            name="stage3",
            summary="fusion: both domains mixed, all experts run; first the fusion alone learns",
            layout="lanes",
            mixed=True,
            rate_factor=1 / 6,
            document_limit=4096,
            fusion_first=0.2,
            follows="stage2",
            cpu=Sizes(batch_size=2, seq_len=512, steps=500, checkpoint_interval=50),
            gpu=Sizes(batch_size=8, seq_len=4096, steps=5000, checkpoint_interval=100),
        ),
        Stage(
            name="instruct",
            summary="following instructions: the loss counts answers only, all experts run",
            layout="lanes",
            mixed=True,
            rate_factor=1 / 10,
            document_limit=None,
            fusion_first=0.0,
            follows="stage3",
            cpu=Sizes(batch_size=2, seq_len=512, steps=500, checkpoint_interval=50),
            gpu=Sizes(batch_size=8, seq_len=2048, steps=5000, checkpoint_interval=100),
            conversations=True,
        ),
        Stage(
            name="chat",
            summary="conversations of many turns: the loss counts answers only, all experts run",
            layout="lanes",
            mixed=True,
            rate_factor=1 / 10,
            document_limit=None,
            fusion_first=0.0,
            follows="instruct",
            cpu=Sizes(batch_size=2, seq_len=512, steps=500, checkpoint_interval=50),
            gpu=Sizes(batch_size=8, seq_len=2048, steps=5000, checkpoint_interval=100),
            conversations=True,
        ),
    )
}

PRETRAINING = ("stage1", "stage2", "stage3")
"""What ``--stage all`` runs, in order."""

FINETUNING = ("instruct", "chat")
"""What ``mm-rec finetune`` runs."""
