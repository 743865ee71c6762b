"""What the run at hand will take, measured on its own trainer, and the lines that say so before the first step."""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import nn

from mm_rec import processes
from mm_rec.data.prepared import Prepared
from mm_rec.optim import AdamW, is_orthogonalized
from mm_rec.program import say
from mm_rec.storage.files import format_bytes, free_bytes
from mm_rec.training.console import describe_seconds
from mm_rec.training.estimate import (
    check_memory,
    checkpoint_bytes,
    count_orthogonalized,
    count_parameters,
    measure_activations,
    measure_checkpointed,
    memory_remedy,
    tokens_that_fit,
    with_margin,
)
from mm_rec.training.plan import Plan
from mm_rec.training.runtime import model_and_optimizer_bytes
from mm_rec.training.trainer import Trainer

__all__ = ["RunEstimate", "announce", "estimate_run"]

GOOD_PASSES, USEFUL_PASSES = 4, 16
"""Up to how many passes data that are read again are about as good as new ones, and after how many they bring next to
nothing (Muennighoff et al. 2023, arXiv:2305.16264)."""

PROBE_PARAMETERS = 4_000_000
"""Parameters of the small update whose time stands for the whole one."""


@dataclass(frozen=True)
class RunEstimate:
    """What a run takes.

    Attributes:
        parameters: parameters of the whole model.
        memory: bytes that a process will take.
        available: bytes that it may take.
        seconds_per_step: time of an optimizer step, saves and validation left out.
    """

    parameters: int
    memory: int
    available: int
    seconds_per_step: float


def estimate_run(trainer: Trainer, gradient_checkpointing: str, available: int) -> RunEstimate:
    """Measure a pass of the next batch, and decide by it whether the model uses gradient checkpointing.

    Args:
        trainer: the trainer, at the step that it goes on from.
        gradient_checkpointing: ``on``, ``off``, or ``auto`` for only where the run does not fit without.
        available: bytes that this process may take.

    Raises:
        UserError: if the run does not fit into memory.
    """
    plan, model, runtime = trainer.plan, trainer.model, trainer.runtime
    fixed = model_and_optimizer_bytes(model.config, runtime, plan)
    domain = None if plan.stage.mixed else model.config.experts[0]
    tokens = plan.batch_size // processes.world_size() * plan.seq_len
    plain = measure_activations(model, domain)
    memory, fitting = with_margin(fixed, plain * tokens), 0
    model.gradient_checkpointing = gradient_checkpointing == "on"
    # A pass of a sharded model needs all processes, and these may differ in what is free.
    if gradient_checkpointing == "on" or memory > available or processes.world_size() > 1:
        checkpointed = measure_checkpointed(model, domain, plain)
        smaller = with_margin(fixed, checkpointed * tokens)
        model.gradient_checkpointing |= gradient_checkpointing == "auto" and smaller <= available < memory
        memory = smaller if model.gradient_checkpointing else memory
        fitting = tokens_that_fit(fixed, checkpointed, available) * processes.world_size()
    check_memory(memory, available, memory_remedy(plan.batch_size, plan.seq_len, fitting))
    parameters = count_parameters(model.config)
    return RunEstimate(parameters, memory, available, _seconds_per_step(trainer, parameters))


def announce(console: Console, trainer: Trainer, data: Prepared, estimate: RunEstimate) -> None:
    """Print what will be trained, on what, and what it takes."""
    plan, runtime, config = trainer.plan, trainer.runtime, trainer.model.config
    tokens = {name: store.n_tokens for name, store in data.train.items()}
    recall = sum(store.n_tokens for store in data.recall.values())
    total = sum(tokens.values()) + recall
    steps = max(0, plan.last_step - trainer.progress.step)  # a finished run may be asked for fewer than it has
    seconds = estimate.seconds_per_step
    passes = plan.steps * plan.tokens_per_step / total
    adapters = "" if plan.lora_rank is None else f"; trained are adapters of rank {plan.lora_rank}"
    several = f"{runtime.processes} processes ({runtime.parallel}) of " if runtime.parallel else ""
    experts = "1 expert" if len(config.experts) == 1 else f"{len(config.experts)} experts"
    checkpointing = ", gradient checkpointing" if trainer.model.gradient_checkpointing else ""
    for line in (
        f"{plan.stage.name}: {plan.stage.summary}",
        f"  model   {estimate.parameters / 1e6:.1f}M parameters: {experts} of {config.n_layers} "
        f"blocks, {config.d_model} wide, vocabulary {config.vocab_size:,}{adapters}",
        f"  runs    on {trainer.device}, {runtime.precision}, {several}{runtime.threads} threads, "
        f"{runtime.ops} kernels{checkpointing}",
        f"  data    {', '.join(f'{name} {count:,} tokens' for name, count in tokens.items())}"
        + (f", rows that train recall {recall:,} tokens ({recall / total:.1%})" if recall else ""),
        f"  steps   {plan.steps} of {plan.accumulation} x {plan.batch_size} x {plan.seq_len} tokens "
        f"({passes:,.1f} passes over the data), {steps} to go, {_describe_optimizer(plan)}",
        *_describe_passes(passes, plan),
        f"  time    {_describe_time(trainer, steps * seconds)} ({seconds:.2f} s a step, "
        f"{plan.tokens_per_step / seconds:,.0f} tokens/s)",
        f"  memory  about {format_bytes(estimate.memory)} of {format_bytes(estimate.available)} free",
        f"  disk    {format_bytes(_checkpoint_bytes(trainer, estimate.parameters))} a checkpoint, "
        f"{plan.keep_checkpoints} kept and the best, {format_bytes(free_bytes(trainer.run.path))} free",
        f"  run     {trainer.run.path}",
    ):
        say(console, line)


def _describe_passes(passes: float, plan: Plan) -> list[str]:
    """What to expect of data that are read so many times, if that is worth a line."""
    if passes <= GOOD_PASSES:
        return []
    later = "the rest only teach it by heart" if passes > USEFUL_PASSES else "each later one teaches less"
    ends = "training ends where validation rises" if plan.stops_early else "training goes on where validation rises"
    return [
        f"          little data: {GOOD_PASSES} passes teach about as much as new text, {later}; {ends}, the best "
        "checkpoint is kept, and more text or a smaller --preset helps"
    ]


def _describe_time(trainer: Trainer, seconds: float) -> str:
    """What the steps that are left take, or when the time for them is over."""
    if trainer.pace is None:
        return f"about {describe_seconds(seconds)}, saves and validation on top"
    end = datetime.datetime.now() + datetime.timedelta(seconds=trainer.pace.left)
    return f"{describe_seconds(trainer.pace.seconds)} as asked, until {end:%H:%M:%S}"


def _describe_optimizer(plan: Plan) -> str:
    """What updates the weights, and how fast."""
    if plan.muon is None:
        return f"learning rate {plan.rate:.1e}"
    return f"Muon at learning rate {plan.rate * plan.muon.rate_factor:.1e}, AdamW for the rest at {plan.rate:.1e}"


def _checkpoint_bytes(trainer: Trainer, parameters: int) -> int:
    return checkpoint_bytes(parameters, count_orthogonalized(trainer.model.config) if trainer.plan.muon else 0)


def _seconds_per_step(trainer: Trainer, parameters: int) -> float:
    """Seconds of a step, from the second of two passes over the next batch, and of two small updates."""
    batch = trainer.feed.take(trainer.batches, trainer.progress.step * trainer.plan.accumulation)
    pass_seconds = 0.0
    for _ in range(2):
        start = time.monotonic()
        loss, _ = trainer.micro_batch_loss(batch)
        loss.backward()
        float(loss.detach())
        pass_seconds = time.monotonic() - start
        trainer.optimizer.zero_grad()
    return trainer.plan.accumulation * pass_seconds + _update_seconds(trainer, parameters)


def _update_seconds(trainer: Trainer, parameters: int) -> float:
    """Seconds of an update: of a vector, and with Muon of the matrices of one block, both as parts of the whole."""
    plan, runtime, config = trainer.plan, trainer.runtime, trainer.model.config
    orthogonalized = count_orthogonalized(config) if plan.muon else 0
    own = (parameters - orthogonalized) / (runtime.processes if runtime.sharded else 1)
    seconds: float = _probe_seconds(trainer, {"probe": (PROBE_PARAMETERS,)}) * own / PROBE_PARAMETERS
    if not plan.muon:
        return seconds
    first = f"experts.{config.experts[0]}.blocks.{config.n_layers - 1}."
    named = trainer.model.named_parameters()
    block = {name: (*one.shape,) for name, one in named if name.startswith(first) and is_orthogonalized(name)}
    # The processes share the matrices of the experts that learn in a step.
    learning = len(config.experts) if plan.stage.mixed else min(plan.accumulation, len(config.experts))
    share = orthogonalized * learning / len(config.experts) / runtime.processes
    elements: int = sum(math.prod(shape) for shape in block.values())
    return seconds + _probe_seconds(trainer, block) * share / elements


def _probe_seconds(trainer: Trainer, shapes: Mapping[str, tuple[int, ...]]) -> float:
    """Seconds of an update of parameters of these names and shapes, the second of two."""
    device, dtype = trainer.device, trainer.model.dtype
    probes = {name: nn.Parameter(torch.zeros(shape, device=device, dtype=dtype)) for name, shape in shapes.items()}
    optimizer = AdamW(probes.items(), muon=trainer.plan.muon)
    seconds = 0.0
    for _ in range(2):
        for probe in probes.values():
            probe.grad = torch.zeros_like(probe)
        start = time.monotonic()
        optimizer.step(0.0, 1.0)
        float(probe.detach().sum())  # waits for the device
        seconds = time.monotonic() - start
    return seconds
