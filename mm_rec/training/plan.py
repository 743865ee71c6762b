"""The plan of one stage: every number that a run needs, derived from settings, stage, device and data."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from mm_rec.errors import UserError
from mm_rec.optim import Muon
from mm_rec.stages import STAGES, Stage
from mm_rec.training.schedule import (
    PEAK_RATE,
    Length,
    betas,
    choose_optimizer,
    learning_rate,
    muon_rate_factor,
    warmup_steps,
)
from mm_rec.training.settings import TrainSettings, step_cap

__all__ = ["Plan", "make_plan"]

EPOCHS_OF_A_SAMPLE = 20
"""Where the data is a sample asked for by size, steps follow from it: so many passes, at most the default."""

LORA_RATE_FACTOR = 10
"""Learning rate of adapters over that of all weights, where the user names none (docs/LOG.md)."""

MOST_VALIDATIONS = 10
VALIDATION_SHARE = 0.02
"""Where there is a time, validations take about this share of it at most."""
VALIDATION_TOKENS = 0.2
"""Tokens of training that take as long as a validation, for each byte that is validated on (docs/LOG.md)."""
MOST_MINUTES_LOST = 5.0
"""Where there is a time, how much of it a crash costs at most; in a short run a twentieth."""

FEWEST_FUSION_STEPS = 30
"""After so many of 2 x 512 tokens the fused model is as good as each domain by its own expert (docs/LOG.md)."""


@dataclass(frozen=True)
class Plan:
    """A stage of training with all numbers filled in.

    Attributes:
        stage: what is trained.
        batch_size, seq_len, accumulation: an optimizer step reads accumulation x batch_size x seq_len tokens.
        length: of the schedule in steps; where there is a time for it, revised on the way.
        cap: steps after which this command stops in any case (MM_REC_MAX_STEPS); None for no cap.
        rate: peak learning rate of this stage.
        fusion_rate: peak learning rate of its steps in which the fusion alone learns.
        weight_decay, clip: of the optimizer.
        seed: of weights, data order and samples.
        checkpoint_interval, keep_checkpoints, eval_interval, valid_bytes: when and how much to save and validate.
        optimizer: one of :data:`mm_rec.training.schedule.OPTIMIZERS`.
        lora_rank, lora_alpha: of the adapters that are trained in place of the weights; None trains the weights.
        minutes: the time that the stage may take; None if its steps decide.
        stops_early: end the stage where validation rises and the data are read again.
    """

    stage: Stage
    batch_size: int
    seq_len: int
    accumulation: int
    length: Length
    cap: int | None
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
    minutes: float | None = None
    stops_early: bool = True

    @property
    def steps(self) -> int:
        """The length of the schedule, as it was decided last."""
        return self.length.steps

    @property
    def last_step(self) -> int:
        """The step after which this command stops."""
        return min(self.steps, self.cap or self.steps)

    def with_revisions(self, revisions: Iterable[tuple[int, int]]) -> Plan:
        """Returns the plan with later decisions about its length: pairs of a step and the steps in all."""
        length = self.length
        for step, steps in revisions:
            length = length.revised(step, steps)
        return replace(self, length=length)

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
        _, steps = self.length.revisions[0]
        share = math.ceil(self.stage.fusion_first * steps)
        return max(share, min(FEWEST_FUSION_STEPS, steps // 2)) if share else 0

    def rate_at(self, step: int) -> float:
        """Learning rate of optimizer step ``step`` (from 1): a schedule for the fusion alone, then one for all."""
        if step <= self.fusion_steps:
            return learning_rate(step, self.fusion_steps, self.fusion_rate)
        first = self.fusion_steps
        steps = self.length.revisions[0][1] - first
        share = self.length.share(step, first + warmup_steps(steps))
        return learning_rate(step - first, steps, self.rate, share)

    def identity(self) -> dict[str, Any]:
        """What decides the result, apart from data, model and device."""
        names = ["batch_size", "seq_len", "accumulation", "rate", "weight_decay", "clip", "seed"]
        if self.optimizer != "adamw":  # which runs had before there was a choice
            names += ["optimizer"]
        if self.lora_rank is not None:
            names += ["lora_rank", "lora_alpha"]
        if self.minutes is not None:
            names.append("minutes")
        return {name: value for name, value in asdict(self).items() if name in names}

    def intervals(self) -> dict[str, Any]:
        """What says only how far and how often; may change when a run is continued."""
        names = ["keep_checkpoints", "valid_bytes"]
        if self.minutes is None:  # else they follow from the speed, which is not known before the run is
            names += ["steps", "checkpoint_interval", "eval_interval"]
        return {name: getattr(self, name) for name in names}


def make_plan(
    settings: TrainSettings, device_type: str, tokens_per_epoch: int, fitting_steps: int | None = None
) -> Plan:
    """Returns the plan of ``settings.stage``.

    Args:
        settings: of the stage.
        device_type: of a ``torch.device``.
        tokens_per_epoch: tokens of the data.
        fitting_steps: how many steps fit into the time that is set, if that is known already.
    """
    if settings.minutes is not None and settings.max_steps is not None:
        raise UserError("--minutes and --max_steps both say how long to train; leave one of them out")
    stage = STAGES[settings.stage]
    sizes = stage.sizes(device_type)
    batch_size = settings.batch_size or sizes.batch_size
    seq_len = settings.seq_len or sizes.seq_len
    tokens_per_step = settings.accumulation * batch_size * seq_len
    steps = settings.max_steps or sizes.steps
    if settings.max_steps is None and (settings.use_synthetic or settings.max_samples is not None):
        steps = min(steps, math.ceil(EPOCHS_OF_A_SAMPLE * tokens_per_epoch / tokens_per_step))
    validations = MOST_VALIDATIONS
    interval = settings.checkpoint_interval or sizes.checkpoint_interval
    if settings.minutes is not None and fitting_steps is not None:
        steps = fitting_steps
        affordable = VALIDATION_SHARE * steps * tokens_per_step / (VALIDATION_TOKENS * settings.valid_bytes)
        validations = max(1, min(MOST_VALIDATIONS, int(affordable)))
        share_lost = min(1 / 20, MOST_MINUTES_LOST / settings.minutes)
        interval = settings.checkpoint_interval or max(1, int(share_lost * steps))
    between_validations = math.ceil(steps / validations / interval) * interval
    rate = PEAK_RATE if settings.lr is None else settings.lr
    if settings.lora is not None and not stage.conversations:
        raise UserError(
            "--lora is for fine-tuning (mm-rec finetune); {name} trains all weights, so leave it out", name=stage.name
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
        length=Length(((0, steps),)),
        cap=step_cap(),
        rate=rate * stage.rate_factor,
        fusion_rate=rate,
        weight_decay=settings.weight_decay,
        clip=settings.clip,
        seed=settings.seed,
        checkpoint_interval=interval,
        keep_checkpoints=settings.keep_checkpoints,
        eval_interval=settings.eval_interval or between_validations,
        valid_bytes=settings.valid_bytes,
        optimizer=choose_optimizer(optimizer, device_type, tokens_per_step),
        lora_rank=settings.lora,
        lora_alpha=None if settings.lora is None else _alpha(settings, settings.lora),
        minutes=settings.minutes,
        stops_early=not settings.no_early_stop,
    )


def _alpha(settings: TrainSettings, rank: int) -> float:
    return 2.0 * rank if settings.lora_alpha is None else settings.lora_alpha
