"""From settings and data to trained stages: which run is meant, what it starts from, what is left to do."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from mm_rec import checkpoint, distributed
from mm_rec.assembly import assemble, choose_runtime
from mm_rec.config import ModelConfig
from mm_rec.data.prepare import Prepared
from mm_rec.device import select_device
from mm_rec.errors import UserError
from mm_rec.plan import Plan, make_plan
from mm_rec.run_config import differences, list_runs
from mm_rec.run_folder import RunFolder
from mm_rec.settings import TrainSettings, step_cap
from mm_rec.signals import SignalGuard
from mm_rec.stages import STAGES
from mm_rec.storage import MANIFEST
from mm_rec.tokenizer import Tokenizer

__all__ = ["starting_checkpoint", "train_stages"]


class _Start(NamedTuple):
    """What a stage starts from: weights, the model they are of, and the hash of their checkpoint."""

    path: Path
    config: ModelConfig
    weights: Mapping[str, Tensor]
    sha256: str


def train_stages(settings: TrainSettings, data: Prepared, guard: SignalGuard, console: Console) -> Path:
    """Run the stages that ``settings`` name, each from the final weights of the one before.

    A stage that is finished is said to be and passed over; one that was stopped goes on.

    Returns:
        The final checkpoint of the last stage.

    Raises:
        UserError: if something does not fit: the memory, the disk, the data or an earlier run.
        Interrupted: after a signal, with everything saved.
    """
    first, *others = settings.stage_names()
    path = _run_stage(settings.for_stage(first), data, guard, console)
    for name in others:
        guard.check()
        following = dataclasses.replace(settings.for_stage(name), init_from=path, resume_from=None)
        path = _run_stage(following, data, guard, console)
    return path


def _run_stage(settings: TrainSettings, data: Prepared, guard: SignalGuard, console: Console) -> Path:
    """Train one stage, or find it finished; returns its final checkpoint."""

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    device = select_device(settings.device)
    plan = make_plan(settings, device.type, sum(store.n_tokens for store in data.train.values()))
    distributed.check_rows(plan.batch_size)
    if not distributed.is_first():
        return _follow_stage(settings, plan, data, guard, console)
    named = checkpoint.load(checkpoint.resolve(settings.resume_from)) if settings.resume_from else None
    start = None if named else _starting_point(settings, data)
    config = named.config if named else _model_config(settings, data, start)
    identity = {
        **plan.identity(),
        "device": device.type,
        "precision": settings.precision,
        "threads": settings.threads,
        "data": data.data_sha256,
        "tokenizer": data.tokenizer.sha256,
        "starts_from": named.trainer["run"]["identity"]["starts_from"] if named else start and start.sha256,
        "model": config.to_dict(),
    }
    if named is not None:
        _check_runtime(settings, named, device)
    with RunFolder.open(
        settings.checkpoint_dir,
        settings.stage,
        identity,
        plan.intervals(),
        fresh=settings.fresh,
        resume_from=settings.resume_from,
        allow_changes=settings.allow_changes,
        on_event=say,
    ) as run:
        if finished := _finished(run, plan):
            say(f"{settings.stage} is finished: {finished}; more --max_steps continue it, --fresh starts anew")
            distributed.shared({"finished": str(finished)})
            return finished
        distributed.shared({"model": config.to_dict()})
        weights = distributed.shared_tensors(start and start.weights)
        trainer = assemble(settings, plan, config, data, weights, run, guard, console)
        path = trainer.fit()
    distributed.shared(str(path))
    say(f"{settings.stage}: {trainer.at.step} steps done, saved in {path}")
    return path


def _follow_stage(settings: TrainSettings, plan: Plan, data: Prepared, guard: SignalGuard, console: Console) -> Path:
    """The part of the other processes in :func:`_run_stage`; what they need to know comes from the first one."""
    word = distributed.shared(None)
    if "finished" in word:
        return Path(word["finished"])
    config, weights = ModelConfig.from_dict(word["model"]), distributed.shared_tensors(None)
    assemble(settings, plan, config, data, weights, distributed.Follower(), guard, console).fit()
    return Path(distributed.shared(None))


def _check_runtime(settings: TrainSettings, named: checkpoint.Checkpoint, device: torch.device) -> None:
    """Refuse to go on with a checkpoint that is asked for by name where the rounding would differ unnoticed."""
    before = named.trainer["runtime"]
    changes = differences(before, choose_runtime(settings, device, before))
    if changes and not settings.allow_changes:
        raise UserError(
            f"{settings.resume_from} would not go on with the same rounding: {'; '.join(changes)}. "
            "--allow_changes accepts that"
        )


def starting_checkpoint(settings: TrainSettings) -> Path | None:
    """Whose weights ``settings.stage`` starts from: the checkpoint named, else the final one of the stage before.

    None for the first stage, which starts from new weights.

    Raises:
        UserError: if there is none.
    """
    before = STAGES[settings.stage].follows
    if settings.init_from is not None:
        return checkpoint.resolve(settings.init_from)
    return _final_checkpoint(settings.checkpoint_dir, before, settings.stage) if before else None


def _starting_point(settings: TrainSettings, data: Prepared) -> _Start | None:
    """The weights that a stage starts from; None for new ones.

    Raises:
        UserError: if there are none, or they are of another tokenizer.
    """
    path = starting_checkpoint(settings)
    if path is None:
        return None
    found = checkpoint.load(path, weights_only=True)
    if Tokenizer.load(found.tokenizer_dir).sha256 != data.tokenizer.sha256:
        raise UserError(
            f"{path} was trained with another tokenizer than that of the data; use the same --data_dir, --preset "
            "and --max_samples as for it, or train the stages before anew"
        )
    return _Start(path, found.config, found.weights, hashlib.sha256((path / MANIFEST).read_bytes()).hexdigest())


def _final_checkpoint(root: Path, stage: str, following: str) -> Path:
    """The final checkpoint of the newest run of ``stage``; an error if that run is not finished."""
    runs = [path for _, path, config in list_runs(root, stage) if config is not None] if root.is_dir() else []
    command = f"mm-rec finetune --task {stage}" if STAGES[stage].conversations else f"mm-rec train --stage {stage}"
    if not runs:
        raise UserError(
            f"{following} starts from a trained {stage} and there is none in {root}; run `{command}` first, "
            "or name a checkpoint with --init_from"
        )
    newest = checkpoint.load_newest(runs[-1] / "checkpoints")
    done = newest.trainer["step"] if newest else 0
    steps = min(newest.trainer["steps"], step_cap() or newest.trainer["steps"]) if newest else 1
    if newest is None or done < steps:
        raise UserError(
            f"{runs[-1]} is not finished ({done} of {steps} steps); go on with `{command}`, "
            f"or start {following} from what is there with --init_from {runs[-1]}"
        )
    return newest.path


def _model_config(settings: TrainSettings, data: Prepared, start: _Start | None) -> ModelConfig:
    if start is not None:
        config = start.config
    else:
        config = ModelConfig.preset(settings.preset, vocab_size=data.tokenizer.padded_vocab_size)
    unknown = sorted(set(data.train) - set(config.experts))
    if unknown and not STAGES[settings.stage].conversations:
        raise UserError(f"there is data of {unknown[0]}, but the model's experts are {', '.join(config.experts)}")
    return config


def _finished(run: RunFolder, plan: Plan) -> Path | None:
    """The final checkpoint of a run that has nothing left to do; its last sample is the last thing that is written."""
    newest = checkpoint.newest_valid(run.checkpoints)
    step = checkpoint.checkpoint_step(newest) if newest else 0
    done = step >= plan.last_step and (run.samples / f"{checkpoint.checkpoint_name(step)}.txt").exists()
    return newest if done else None
