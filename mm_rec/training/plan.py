"""The plan of one stage: every number that a run needs, derived from settings, stage, device and data."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from mm_rec.errors import UserError
from mm_rec.optim import Muon
from mm_rec.stages import STAGES, Stage
from mm_rec.training.schedule import PEAK_RATE, betas, choose_optimizer, learning_rate, muon_rate_factor
from mm_rec.training.settings import TrainSettings, step_cap

__all__ = ["Plan", "make_plan"]

EPOCHS_OF_A_SAMPLE = 20
"""Where the data is a sample asked for by size, steps follow from it: so many passes, at most the default."""

LORA_RATE_FACTOR = 10
"""Learning rate of adapters over that of all weights, where the user names none (docs/LOG.md)."""

FEWEST_FUSION_STEPS = 30
"""After so many of 2 x 512 tokens the fused model is as good as each domain by its own expert (docs/LOG.md)."""


@dataclass(frozen=True)
class Plan:
    """A stage of training with all numbers filled in.

    Attributes:
        stage: what is trained.
        batch_size, seq_len, accumulation: an optimizer step reads accumulation x batch_size x seq_len tokens.
        steps: the length of the schedule.
        last_step: where this command stops: ``steps``, or less under MM_REC_MAX_STEPS.
        rate: peak learning rate of this stage.
        fusion_rate: peak learning rate of its steps in which the fusion alone learns.
        weight_decay, clip: of the optimizer.
        seed: of weights, data order and samples.
        checkpoint_interval, keep_checkpoints, eval_interval, valid_bytes: when and how much to save and validate.
        optimizer: one of :data:`mm_rec.training.schedule.OPTIMIZERS`.
        lora_rank, lora_alpha: of the adapters that are trained in place of the weights; None trains the weights.
    """

    stage: Stage
    batch_size: int
    seq_len: int
    accumulation: int
    steps: int
    last_step: int
    rate: float
    fusion_rate: float
    weight_decay: float
    clip: float
    seed: int
    checkpoint_interval: int
    keep_checkpoints: int
    eval_interval: int
    valid_bytes: int
    optimizer: str = "adamw"
    lora_rank: int | None = None
    lora_alpha: float | None = None

    @property
    def tokens_per_step(self) -> int:
        """Tokens that an optimizer step reads."""
        return self.accumulation * self.batch_size * self.seq_len

    @property
    def betas(self) -> tuple[float, float]:
        """The betas of AdamW."""
        return betas(self.tokens_per_step)

    @property
    def muon(self) -> Muon | None:
        """How the matrices of the blocks are updated; None for by AdamW, as everything else."""
        return Muon(muon_rate_factor(self.tokens_per_step)) if self.optimizer == "muon" else None

    @property
    def fusion_steps(self) -> int:
        """How many steps, at the start, train the fusion alone: a share, in a short run as many as it needs."""
        share = math.ceil(self.stage.fusion_first * self.steps)
        return max(share, min(FEWEST_FUSION_STEPS, self.steps // 2)) if share else 0

    def rate_at(self, step: int) -> float:
        """Learning rate of optimizer step ``step`` (from 1): a schedule for the fusion alone, then one for all."""
        if step <= self.fusion_steps:
            return learning_rate(step, self.fusion_steps, self.fusion_rate)
        return learning_rate(step - self.fusion_steps, self.steps - self.fusion_steps, self.rate)

    def identity(self) -> dict[str, Any]:
        """What decides the result, apart from data, model and device."""
        names = ["batch_size", "seq_len", "accumulation", "rate", "weight_decay", "clip", "seed"]
        if self.optimizer != "adamw":  # which runs had before there was a choice
            names += ["optimizer"]
        if self.lora_rank is not None:
            names += ["lora_rank", "lora_alpha"]
        return {name: value for name, value in asdict(self).items() if name in names}

    def intervals(self) -> dict[str, Any]:
        """What says only how far and how often; may change when a run is continued."""
        names = ("steps", "checkpoint_interval", "keep_checkpoints", "eval_interval", "valid_bytes")
        return {name: value for name, value in asdict(self).items() if name in names}


def make_plan(settings: TrainSettings, device_type: str, tokens_per_epoch: int) -> Plan:
    """The plan of ``settings.stage`` on a device for data of ``tokens_per_epoch`` tokens."""
    stage = STAGES[settings.stage]
    sizes = stage.sizes(device_type)
    batch_size = settings.batch_size or sizes.batch_size
    seq_len = settings.seq_len or sizes.seq_len
    tokens_per_step = settings.accumulation * batch_size * seq_len
    steps = settings.max_steps or sizes.steps
    if settings.max_steps is None and (settings.use_synthetic or settings.max_samples is not None):
        steps = min(steps, math.ceil(EPOCHS_OF_A_SAMPLE * tokens_per_epoch / tokens_per_step))
    interval = settings.checkpoint_interval or sizes.checkpoint_interval
    tenth = math.ceil(steps / 10 / interval) * interval
    rate = PEAK_RATE if settings.lr is None else settings.lr
    if settings.lora is not None and not stage.conversations:
        raise UserError(
            f"--lora is for fine-tuning (mm-rec finetune); {stage.name} trains all weights, so leave it out"
        )
    if settings.lora is not None and settings.lr is None:
        rate *= LORA_RATE_FACTOR
    if settings.lora is not None and settings.optimizer == "muon":
        raise UserError("--lora trains adapters, which AdamW updates; leave --optimizer muon out, or --lora")
    optimizer = "adamw" if settings.lora is not None else settings.optimizer
    return Plan(
        stage=stage,
        batch_size=batch_size,
        seq_len=seq_len,
        accumulation=settings.accumulation,
        steps=steps,
        last_step=min(steps, step_cap() or steps),
        rate=rate * stage.rate_factor,
        fusion_rate=rate,
        weight_decay=settings.weight_decay,
        clip=settings.clip,
        seed=settings.seed,
        checkpoint_interval=interval,
        keep_checkpoints=settings.keep_checkpoints,
        eval_interval=settings.eval_interval or tenth,
        valid_bytes=settings.valid_bytes,
        optimizer=choose_optimizer(optimizer, device_type, tokens_per_step),
        lora_rank=settings.lora,
        lora_alpha=None if settings.lora is None else _alpha(settings, settings.lora),
    )


def _alpha(settings: TrainSettings, rank: int) -> float:
    return 2.0 * rank if settings.lora_alpha is None else settings.lora_alpha
