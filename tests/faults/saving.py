"""Work for the supervisor: saving checkpoints, and a run that saves as it goes."""

from __future__ import annotations

import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from mm_rec.config import ModelConfig
from mm_rec.storage import checkpoint, files
from mm_rec.storage.resume import open_run, rewind
from mm_rec.text.tokenizer import train_tokenizer

CONFIG = ModelConfig.preset("tiny", vocab_size=320, d_model=8, n_layers=1, d_ff=16)
IDENTITY = {"seed": 0}
INTERVAL = 3
TOKENIZER = train_tokenizer(["a small text, a small tokenizer"] * 4, 300)


def content(step: int) -> dict[str, Any]:
    """All that the checkpoint of a step holds: a function of the step."""
    return {
        "config": CONFIG,
        "weights": {"w": torch.full((2000,), float(step)), "b": torch.arange(7.0) + step},
        "optimizer": {"exp_avg.w": torch.full((2000,), step / 3)},
        "carried": {"h": torch.full((3, 5), step * 2.0)},
        "trainer": {"rng": [step, step + 1]},
        "tokenizer": TOKENIZER,
    }


def check(found: checkpoint.Checkpoint) -> int:
    """Assert that a checkpoint holds what its step's has to hold, nothing of another; returns the step."""
    step = checkpoint.checkpoint_step(found.path)
    expected = content(step)
    for part in ("weights", "optimizer", "carried"):
        tensors = getattr(found, part)
        assert tensors.keys() == expected[part].keys()
        assert all(torch.equal(tensor, expected[part][name]) for name, tensor in tensors.items())
    assert found.trainer["rng"] == expected["trainer"]["rng"]
    return step


def save(folder: str, step: int) -> None:
    """Save one checkpoint into a folder of checkpoints."""
    checkpoint.save(Path(folder) / checkpoint.checkpoint_name(step), **content(step))


def save_beyond_limit(folder: str, step: int, limit: int) -> None:
    """Save where no file may be larger than ``limit``: a write that crosses it is cut short, the next one fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        save(folder, step)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def save_without_check(folder: str, step: int) -> None:
    """Save as if something else took the space between the check and the writing."""
    files.require_space = lambda path, n_bytes: None
    save(folder, step)


def loss(step: int) -> float:
    return 10 / (step + 1)


def train(root: str, steps: int, seconds_a_step: float = 0.0) -> None:
    """A run that goes on from where it was: records every step, saves every third, keeps two."""
    with open_run(Path(root), "stage1", IDENTITY) as run:
        resumed = rewind(run)
        if resumed is not None:
            check(resumed)
            checkpoint.prune(run.checkpoints, keep_last=2)  # the kill may have come just before it
        for step in range(run.step + 1, steps + 1):
            time.sleep(seconds_a_step)
            run.log_loss(step, loss(step))
            run.log_metrics(step, loss=loss(step))
            if step % INTERVAL == 0 or step == steps:
                run.save(step, **content(step))
                checkpoint.prune(run.checkpoints, keep_last=2)


def own(root: str) -> None:
    """Own the run folder for a minute."""
    with open_run(Path(root), "stage1", IDENTITY) as run:
        print(f"owner of {run.path}", flush=True)
        time.sleep(60)


def warm_up() -> None:
    """Let the fork server import what saving and loading import late, so that no trial hits that."""
    with tempfile.TemporaryDirectory() as folder:
        save(folder, 0)
        checkpoint.load_newest(Path(folder))


warm_up()
