"""Runs of a few steps, and all of a run that has to come out the same."""

import io
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from rich.console import Console

from mm_rec.data.prepared import Prepared
from mm_rec.machine.signals import SignalGuard
from mm_rec.storage import checkpoint
from mm_rec.storage.run_folder import RunFolder
from mm_rec.training.run_stages import train_stages
from mm_rec.training.settings import TrainSettings

RECORDS = ("loss_log.txt", "metrics.jsonl")


def settings(folder: Path, **changes: object) -> TrainSettings:
    values = {
        "preset": "tiny",
        "checkpoint_dir": folder,
        "seq_len": 16,
        "max_steps": 10,
        "checkpoint_interval": 3,
        "keep_checkpoints": 100,
        "eval_interval": 4,
        "valid_bytes": 200,
        "device": "cpu",
        **changes,
    }
    return TrainSettings(**values)


def train(data: Prepared, wanted: TrainSettings, output: io.StringIO | None = None) -> Path:
    with SignalGuard() as guard:
        return train_stages(wanted, data, guard, Console(file=output or io.StringIO(), width=200))


def content(run: Path, step: int) -> dict[str, object]:
    """All of a run that has to come out the same."""
    found = checkpoint.load(run / "checkpoints" / checkpoint.checkpoint_name(step))
    tensors = {**found.weights, **found.optimizer, **found.carried}
    return {
        **{name: (run / name).read_bytes() for name in RECORDS},
        **{name: tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()},
        "trainer": json.dumps(found.trainer),
        "samples": sorted((path.name, path.read_bytes()) for path in (run / "samples").iterdir()),
    }


def signal_after(monkeypatch: pytest.MonkeyPatch, step: int, signum: int = signal.SIGTERM) -> None:
    """Send a signal in the middle of a step, once."""
    log_loss = RunFolder.log_loss
    sent = []

    def log_and_signal(run: RunFolder, at: int, loss: float) -> None:
        log_loss(run, at, loss)
        if at == step and not sent:
            sent.append(at)
            os.kill(os.getpid(), signum)

    monkeypatch.setattr(RunFolder, "log_loss", log_and_signal)
