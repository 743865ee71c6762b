"""The parts of a trainer, put together: model, optimizer, batches, held-out documents."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from rich.console import Console
from torch import Tensor

from mm_rec import processes
from mm_rec.config import ModelConfig
from mm_rec.data.batches import Batches, EvenBatches
from mm_rec.data.prepared import Prepared
from mm_rec.evaluation.bits_per_byte import select_documents
from mm_rec.machine.device import apply_precision
from mm_rec.machine.signals import SignalGuard
from mm_rec.model import MMRecModel
from mm_rec.optim import AdamW
from mm_rec.storage.run_folder import Run
from mm_rec.system import keep_freed_memory
from mm_rec.training.ddp import ReplicatedAdamW
from mm_rec.training.lora import LoraAdamW
from mm_rec.training.pace import Pace
from mm_rec.training.plan import Plan
from mm_rec.training.ranks import StageStart
from mm_rec.training.runtime import Runtime
from mm_rec.training.settings import TrainSettings
from mm_rec.training.tensorboard import Board
from mm_rec.training.trainer import MIXED, Trainer

__all__ = ["build_trainer"]


def build_trainer(
    settings: TrainSettings,
    plan: Plan,
    start: StageStart,
    data: Prepared,
    runtime: Runtime,
    device: torch.device,
    run: Run,
    guard: SignalGuard,
    console: Console,
    pace: Pace | None = None,
) -> Trainer:
    """Returns a trainer at step 0 with the weights of ``start``; :meth:`Trainer.restore` then takes a checkpoint.

    Args:
        settings, plan: the settings and the numbers of this stage.
        start: the shape of the model, and its weights if they are not new.
        data: the data to train on.
        runtime, device: how and where to train.
        run: the run folder, owned.
        guard: tells of signals.
        console: where to print.
        pace: the clock of the stage, if the plan has a time for it.
    """
    keep_freed_memory()
    model, optimizer = _model_and_optimizer(start.config, plan, runtime, device)
    if start.checkpoint is None and (weights := _initial_weights(start, plan.seed)) is not None:
        optimizer.load_master_tensors(weights)
    if isinstance(optimizer, LoraAdamW) and start.checkpoint is None and processes.world_size() > 1:
        # As below: what is drawn is drawn by rank 0 alone.
        drawn = optimizer.state_tensors() if processes.is_rank_zero() else None
        optimizer.load_state_tensors(processes.broadcast_tensors(drawn) or {})
    token_sizes = data.tokenizer.token_sizes
    valid = {name: select_documents(store, token_sizes, plan.valid_bytes) for name, store in data.valid.items()}
    sizes = {"batch_size": plan.batch_size, "seq_len": plan.seq_len, "seed": plan.seed}
    writes_board = settings.tensorboard and processes.is_rank_zero()
    return Trainer(
        plan,
        model=model,
        optimizer=optimizer,
        batches=Batches(
            data.train,
            **sizes,
            layout=plan.stage.layout,
            mixed=plan.stage.mixed,
            document_limit=plan.stage.document_limit,
            more=data.recall,
        ),
        even_batches=EvenBatches(data.train, **sizes) if plan.fusion_steps else None,
        pace=pace,
        valid={name: documents for name, documents in valid.items() if documents.tokens},
        bytes_per_token=_bytes_per_token(data),
        tokenizer=data.tokenizer,
        run=run,
        runtime=runtime,
        guard=guard,
        console=console,
        board=Board(run.path / "tensorboard", run.step + 1) if writes_board else None,
    )


def _model_and_optimizer(
    config: ModelConfig, plan: Plan, runtime: Runtime, device: torch.device
) -> tuple[MMRecModel, AdamW]:
    """The model on ``device`` and its optimizer; a sharded model has no values yet."""
    kind = AdamW if processes.world_size() == 1 else ReplicatedAdamW
    if runtime.sharded:
        from mm_rec.training.fsdp import (  # importing FSDP takes a second, and few runs need it
            ShardedAdamW,
            sharded_model,
        )

        model, kind = sharded_model(config, runtime.precision, device), ShardedAdamW
    else:
        model = MMRecModel(config, seed=plan.seed)
        apply_precision(model, runtime.precision)
        model.to(device)
    if plan.lora_rank is not None:
        assert plan.lora_alpha is not None, "the plan has filled it in"
        return model, LoraAdamW(
            model.named_parameters(),
            rank=plan.lora_rank,
            alpha=plan.lora_alpha,
            seed=plan.seed,
            betas=plan.betas,
            weight_decay=plan.weight_decay,
        )
    return model, kind(model.named_parameters(), betas=plan.betas, weight_decay=plan.weight_decay, muon=plan.muon)


def _initial_weights(start: StageStart, seed: int) -> Mapping[str, Tensor] | None:
    """The weights to load before the first step; None where the model has drawn its own."""
    if start.weights is not None or processes.world_size() == 1:
        return start.weights
    # Processors of different kinds may draw different numbers from one seed, so rank 0 draws for all.
    return processes.broadcast_tensors(_draw_weights(start.config, seed) if processes.is_rank_zero() else None)


def _draw_weights(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in MMRecModel(config, seed=seed).named_parameters()}


def _bytes_per_token(data: Prepared) -> dict[str, float]:
    """UTF-8 bytes for each token that counts in the loss, by domain and, as MIXED, over all training data."""
    sizes = {
        name: (
            int(store.n_bytes.sum()),
            store.n_tokens if store.loss_mask is None else store.loss_mask.sum(),
        )
        for name, store in data.train.items()
    }
    sizes[MIXED] = (sum(n_bytes for n_bytes, _ in sizes.values()), sum(n_tokens for _, n_tokens in sizes.values()))
    return {name: n_bytes / n_tokens for name, (n_bytes, n_tokens) in sizes.items()}
