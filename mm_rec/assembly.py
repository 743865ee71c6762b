"""Put a trainer together: what this machine runs it with, whether it fits, what it will take."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from mm_rec import distributed, ops
from mm_rec.board import Board
from mm_rec.checkpoint import list_checkpoints
from mm_rec.config import ModelConfig
from mm_rec.data.batches import Batches, EvenBatches
from mm_rec.data.prepare import Prepared
from mm_rec.device import (
    apply_precision,
    available_memory,
    keep_freed_memory,
    select_device,
    select_precision,
    set_threads,
)
from mm_rec.estimate import (
    check_disk,
    check_memory,
    checkpoint_bytes,
    count_parameters,
    measure_activations,
    memory_remedy,
    sharded_bytes,
    training_bytes,
    with_margin,
)
from mm_rec.evaluate import select_documents
from mm_rec.model import MMRecModel
from mm_rec.optim import AdamW
from mm_rec.plan import Plan
from mm_rec.progress import describe_seconds
from mm_rec.replicas import ReplicatedAdamW
from mm_rec.run_config import differences
from mm_rec.run_folder import RunFolder
from mm_rec.settings import TrainSettings
from mm_rec.signals import SignalGuard
from mm_rec.storage import format_bytes, free_bytes
from mm_rec.trainer import MIXED, Trainer

__all__ = ["assemble", "choose_runtime"]

PROBE_PARAMETERS = 4_000_000


def assemble(
    settings: TrainSettings,
    plan: Plan,
    config: ModelConfig,
    data: Prepared,
    weights: Mapping[str, Tensor] | None,
    run: RunFolder,
    guard: SignalGuard,
    console: Console,
) -> Trainer:
    """The trainer of a run at the step it has reached, after printing what is to come.

    Args:
        settings, plan: of this stage.
        config: of the model.
        data: to train on.
        weights: to start from if the run has no checkpoint; None for new ones.
        run: the folder, owned.
        guard: of signals.
        console: to print on.

    Raises:
        UserError: if memory or disk don't suffice.
    """
    device = select_device(settings.device)
    available = available_memory(device) // (distributed.local_size() if device.type == "cpu" else 1)
    parameters = count_parameters(config)
    found = distributed.shared_checkpoint(run.rewind())
    before = found.trainer["runtime"] if found else {}
    runtime = choose_runtime(settings, device, before)
    runtime["precision"] = distributed.shared(runtime["precision"])
    training = training_bytes(parameters, runtime["precision"], replicated=distributed.size() > 1)
    if distributed.size() > 1:
        too_large = distributed.agree(int(with_margin(training, 0) > available))
        runtime["parallel"] = _choose_parallel(runtime["parallel"], settings.parallel, bool(too_large))
    if before and (changes := differences(before, runtime)):
        run.event(f"not the same machine or choices as before, so not the same rounding: {'; '.join(changes)}")
    sharded = runtime.get("parallel") == "fsdp"
    if sharded:
        training = sharded_bytes(config, runtime["precision"], distributed.size())
    remedy = "try a smaller --preset" + (", or more processes" if sharded else "")
    check_memory(with_margin(training, 0), available, f"that is the model and its optimizer alone: {remedy}")
    if distributed.is_first():
        saved = len(list_checkpoints(run.checkpoints))
        check_disk(run.path, checkpoint_bytes(parameters), plan.keep_checkpoints, saved)

    keep_freed_memory()
    model, optimizer = _model_and_optimizer(config, plan, runtime["precision"], device, sharded)
    if distributed.size() > 1 and weights is None and found is None:
        # Processors of different kinds may draw different numbers from one seed.
        weights = distributed.shared_tensors(_first_weights(config, plan.seed) if distributed.is_first() else None)
    if weights is not None:
        optimizer.load_master_tensors(weights)
    token_bytes = np.array([len(one) for one in data.tokenizer.token_bytes])
    valid = {name: select_documents(store, token_bytes, plan.valid_bytes) for name, store in data.valid.items()}
    sizes = {"batch_size": plan.batch_size, "seq_len": plan.seq_len, "seed": plan.seed}
    trainer = Trainer(
        plan,
        model=model,
        optimizer=optimizer,
        batches=Batches(
            data.train,
            **sizes,
            layout=plan.stage.layout,
            mixed=plan.stage.mixed,
            document_limit=plan.stage.document_limit,
        ),
        even_batches=EvenBatches(data.train, **sizes) if plan.fusion_steps else None,
        valid={name: documents for name, documents in valid.items() if documents.tokens},
        bytes_per_token=_bytes_per_token(data),
        tokenizer=data.tokenizer,
        run=run,
        runtime=runtime,
        guard=guard,
        console=console,
        board=Board(run.path / "tensorboard", run.step + 1)
        if settings.tensorboard and distributed.is_first()
        else None,
    )
    if found is not None:
        trainer.restore(found)

    activations = measure_activations(model, None if plan.stage.mixed else config.experts[0])
    tokens = plan.batch_size // distributed.size() * plan.seq_len
    plain, checkpointed = (with_margin(training, one * tokens) for one in (activations.plain, activations.checkpointed))
    model.gradient_checkpointing = settings.gradient_checkpointing == "on" or (
        settings.gradient_checkpointing == "auto" and checkpointed <= available < plain
    )
    needed = checkpointed if model.gradient_checkpointing else plain
    check_memory(needed, available, memory_remedy(plan.batch_size, plan.seq_len))
    seconds = _seconds_per_step(trainer, parameters // (distributed.size() if sharded else 1))
    for line in _describe(trainer, data, parameters, seconds, needed, available):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return trainer


def _model_and_optimizer(
    config: ModelConfig, plan: Plan, precision: str, device: torch.device, sharded: bool
) -> tuple[MMRecModel, AdamW]:
    """On ``device``; what is ``sharded`` has no values yet."""
    kind = AdamW if distributed.size() == 1 else ReplicatedAdamW
    if sharded:
        from mm_rec.sharding import ShardedAdamW, sharded_model  # a second of imports that few runs need

        model, kind = sharded_model(config, precision, device), ShardedAdamW
    else:
        model = MMRecModel(config, seed=plan.seed)
        apply_precision(model, precision)
        model.to(device)
    return model, kind(model.named_parameters(), betas=plan.betas, weight_decay=plan.weight_decay)


def _first_weights(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in MMRecModel(config, seed=seed).named_parameters()}


def _choose_parallel(chosen: str, requested: str, too_large: bool) -> str:
    """``ddp`` or ``fsdp``; with ``auto``, FSDP if the run had it or a whole model is ``too_large`` for a process."""
    if requested != "auto":
        return requested
    return "fsdp" if too_large or chosen == "fsdp" else "ddp"


def choose_runtime(settings: TrainSettings, device: torch.device, before: Mapping[str, Any]) -> dict[str, Any]:
    """Precision, threads, kernels, processes: what is asked for, else what the run had ``before``, else what suits."""
    precision = before.get("precision", "auto") if settings.precision == "auto" else settings.precision
    threads = settings.threads
    if threads is None and before.get("processes", 1) == distributed.size():
        threads = before.get("threads")
    if threads is None and distributed.size() > 1:
        threads = distributed.default_threads()  # torchrun would have one, whatever there is
    runtime = {
        "precision": select_precision(precision, device),
        "threads": set_threads(threads),
        "ops": _describe_ops(device),
    }
    if distributed.size() == 1:
        return runtime
    parallel = before.get("parallel", "auto") if settings.parallel == "auto" else settings.parallel
    return {**runtime, "processes": distributed.size(), "parallel": parallel}


def _describe_ops(device: torch.device) -> str:
    status = ops.status()[device.type]
    return f"{status.backend} {status.level}" if status.level else status.backend


def _bytes_per_token(data: Prepared) -> dict[str, float]:
    """UTF-8 bytes a token that counts stands for, by domain and in all training data."""
    sizes = {
        name: (
            int(store.n_bytes.sum()),
            store.n_tokens if store.loss_mask is None else int(store.loss_mask.sum(dtype=int)),
        )
        for name, store in data.train.items()
    }
    sizes[MIXED] = (sum(n_bytes for n_bytes, _ in sizes.values()), sum(n_tokens for _, n_tokens in sizes.values()))
    return {name: n_bytes / n_tokens for name, (n_bytes, n_tokens) in sizes.items()}


def _describe(
    trainer: Trainer, data: Prepared, parameters: int, seconds: float, needed: int, available: int
) -> list[str]:
    """What will be trained, on what, and what it takes."""
    plan, runtime, config = trainer.plan, trainer.runtime, trainer.model.config
    tokens = {name: store.n_tokens for name, store in data.train.items()}
    steps = plan.last_step - trainer.at.step
    passes = plan.steps * plan.tokens_per_step / sum(tokens.values())
    processes = f"{runtime['processes']} processes ({runtime['parallel']}) of " if "processes" in runtime else ""
    checkpointing = ", gradient checkpointing" if trainer.model.gradient_checkpointing else ""
    return [
        f"{plan.stage.name}: {plan.stage.summary}",
        f"  model   {parameters / 1e6:.1f}M parameters: {len(config.experts)} experts of {config.n_layers} blocks, "
        f"{config.d_model} wide, vocabulary {config.vocab_size:,}",
        f"  runs    on {trainer.device}, {runtime['precision']}, {processes}{runtime['threads']} threads, "
        f"{runtime['ops']} kernels{checkpointing}",
        f"  data    {', '.join(f'{name} {count:,} tokens' for name, count in tokens.items())}",
        f"  steps   {plan.steps} of {plan.accumulation} x {plan.batch_size} x {plan.seq_len} tokens "
        f"({passes:.1f} passes over the data), {steps} to go, learning rate {plan.rate:.1e}",
        f"  time    about {describe_seconds(steps * seconds)} ({seconds:.2f} s a step, "
        f"{plan.tokens_per_step / seconds:,.0f} tokens/s), saves and validation on top",
        f"  memory  about {format_bytes(needed)} of {format_bytes(available)} free",
        f"  disk    {format_bytes(checkpoint_bytes(parameters))} a checkpoint, {plan.keep_checkpoints} kept, "
        f"{format_bytes(free_bytes(trainer.run.path))} free",
        f"  run     {trainer.run.path}",
    ]


def _seconds_per_step(trainer: Trainer, parameters: int) -> float:
    """Seconds of a step, from the second of two passes over the next batch and a small update."""
    batch = trainer.feed.take(trainer.batches, trainer.at.step * trainer.plan.accumulation)
    pass_seconds = update_seconds = 0.0
    probe = nn.Parameter(torch.zeros(PROBE_PARAMETERS, device=trainer.device, dtype=trainer.model.dtype))
    optimizer = AdamW([("probe", probe)])
    for _ in range(2):
        start = time.monotonic()
        loss, _ = trainer.micro_batch_loss(batch)
        loss.backward()
        float(loss.detach())
        pass_seconds = time.monotonic() - start
        trainer.optimizer.zero_grad()
        probe.grad = torch.zeros_like(probe)
        start = time.monotonic()
        float(optimizer.step(0.0, 1.0))
        update_seconds = time.monotonic() - start
    return trainer.plan.accumulation * pass_seconds + update_seconds * parameters / PROBE_PARAMETERS
