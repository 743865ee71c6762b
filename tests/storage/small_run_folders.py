"""A run folder of a tiny model, and what a trainer writes into it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from mm_rec.config import ModelConfig
from mm_rec.storage.resume import open_run, rewind
from mm_rec.storage.run_folder import RunFolder
from mm_rec.text.tokenizer import Tokenizer

CONFIG = ModelConfig.preset("tiny", vocab_size=320, d_model=8, n_layers=1, d_ff=16)
IDENTITY = {"model": CONFIG.to_dict(), "lr": 1e-5, "batch_size": 2, "data_sha256": "1e10", "betas": (0.9, 0.95)}


def open_small(
    root: Path, identity: dict[str, Any] = IDENTITY, events: list[str] | None = None, **kw: Any
) -> RunFolder:
    on_event = events.append if events is not None else None
    return open_run(root, "stage1", identity, kw.pop("settings", {"max_steps": 100}), on_event=on_event, **kw)


def save(run: RunFolder, step: int, tokenizer: Tokenizer) -> Path:
    return run.save(
        step,
        config=CONFIG,
        weights={"w": torch.full((3,), float(step))},
        optimizer={},
        carried={},
        trainer={"note": step},
        tokenizer=tokenizer,
    )


def train(run: RunFolder, tokenizer: Tokenizer, until: int, interval: int = 5) -> None:
    """What a trainer does: records of every step, a checkpoint, then what follows a checkpoint."""
    if rewind(run):
        run.log_metrics(run.step, valid=2 / run.step)
    for step in range(run.step + 1, until + 1):
        run.log_loss(step, 10 / step)
        run.log_metrics(step, loss=10 / step)
        run.log_timing(step, seconds=time.monotonic())
        if step % interval == 0:
            save(run, step, tokenizer)
            run.log_metrics(step, valid=2 / step)


def records(run: Path) -> dict[str, bytes]:
    return {name: (run / name).read_bytes() for name in ("metrics.jsonl", "loss_log.txt")}
