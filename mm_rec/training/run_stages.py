"""From settings and data to trained stages: a few functions in a row for each stage."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import torch
from rich.console import Console

from mm_rec import processes
from mm_rec.config import ModelConfig
from mm_rec.data.prepare_recall import add_recall_rows
from mm_rec.data.prepared import Prepared
from mm_rec.data.recall_rows import LONGEST
from mm_rec.errors import UserError
from mm_rec.machine.device import select_device
from mm_rec.machine.signals import SignalGuard
from mm_rec.program import say
from mm_rec.storage import checkpoint
from mm_rec.storage.resume import cut_back, find_newest, open_run
from mm_rec.storage.run_config import differences
from mm_rec.storage.run_folder import Run, RunFolder
from mm_rec.training.build import build_trainer
from mm_rec.training.estimate import (
    check_disk,
    check_memory,
    checkpoint_bytes,
    count_orthogonalized,
    count_parameters,
    with_margin,
)
from mm_rec.training.initial_weights import StartingPoint, find_starting_point
from mm_rec.training.plan import Plan, make_plan
from mm_rec.training.ranks import NoRunFolder, StageStart, broadcast_path, broadcast_start
from mm_rec.training.run_estimate import announce, estimate_run
from mm_rec.training.runtime import (
    Runtime,
    agree_on_runtime,
    choose_runtime,
    memory_of_process,
    model_and_optimizer_bytes,
)
from mm_rec.training.settings import TrainSettings

__all__ = ["train_stages"]


def train_stages(settings: TrainSettings, data: Prepared, guard: SignalGuard, console: Console) -> Path:
    """Run the stages that ``settings`` name, each from the final weights of the one before.

    A finished stage is reported and passed over; a stopped one goes on.

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
    device = select_device(settings.device)
    plan = make_plan(settings, device.type, sum(store.n_tokens for store in data.train.values()))
    data = _with_recall_rows(settings, plan, data, console)
    processes.check_rows(plan.batch_size)
    point = find_starting_point(settings, plan, data, device) if processes.is_rank_zero() else None
    available = memory_of_process(device)  # before anything of the run is loaded
    with NoRunFolder() if point is None else _open_run(settings, plan, point, console) as run:
        start = broadcast_start(None if point is None else _read_start(run, plan, point))
        if start.finished is not None:
            say(
                console,
                f"{settings.stage} is finished: {start.finished}; more --max_steps continue it, --fresh starts anew",
            )
            return start.finished
        runtime = _choose_runtime(settings, plan, start, run, device, available)
        _check_room(plan, start.config, runtime, run, available)
        trainer = build_trainer(settings, plan, start, data, runtime, device, run, guard, console)
        if start.checkpoint is not None:
            trainer.restore(start.checkpoint)
        saved = start.checkpoint.trainer if start.checkpoint else None
        del start, point  # the weights that they hold are in the model
        announce(console, trainer, data, estimate_run(trainer, settings.gradient_checkpointing, available))
        if isinstance(run, RunFolder):  # nothing that cannot be undone comes before all that can refuse
            cut_back(run, saved)
        path = trainer.fit()
    path = broadcast_path(path)
    say(console, f"{settings.stage}: {trainer.progress.step} steps done, saved in {path}")
    return path


def _with_recall_rows(settings: TrainSettings, plan: Plan, data: Prepared, console: Console) -> Prepared:
    """The data with the rows that train recall, which are short where text is cut into windows."""
    longest = LONGEST if plan.stage.layout == "lanes" else max(plan.seq_len // 2, 1)
    share = settings.recall_share_of(plan.stage)
    return add_recall_rows(data, share, longest=longest, progress=functools.partial(say, console))


def _open_run(settings: TrainSettings, plan: Plan, point: StartingPoint, console: Console) -> RunFolder:
    """Find or make the run folder of the stage, and own it."""
    return open_run(
        settings.checkpoint_dir,
        settings.stage,
        point.identity,
        plan.intervals(),
        fresh=settings.fresh,
        resume_from=settings.resume_from,
        allow_changes=settings.allow_changes,
        on_event=functools.partial(say, console),
    )


def _read_start(run: Run, plan: Plan, point: StartingPoint) -> StageStart:
    """What rank 0 finds in its run folder: a finished run, a checkpoint, or nothing yet."""
    assert isinstance(run, RunFolder), "rank 0 owns the run folder"
    if finished := _finished(run, plan):
        return StageStart(point.config, finished=finished)
    return StageStart(point.config, point.weights, find_newest(run))


def _finished(run: Run, plan: Plan) -> Path | None:
    """The final checkpoint of a run that has nothing left to do; its last sample is the last file that is written."""
    newest = checkpoint.newest_valid(run.checkpoints)
    step = checkpoint.checkpoint_step(newest) if newest else 0
    done = step >= plan.last_step and (run.samples / f"{checkpoint.checkpoint_name(step)}.txt").exists()
    return newest if done else None


def _choose_runtime(
    settings: TrainSettings, plan: Plan, start: StageStart, run: Run, device: torch.device, available: int
) -> Runtime:
    """How to run the stage; what differs from the run's last checkpoint is recorded."""
    before = start.checkpoint.trainer["runtime"] if start.checkpoint else {}
    chosen = choose_runtime(settings, device, before)
    runtime = agree_on_runtime(chosen, settings, plan, start.config, available)
    if runtime.sharded and settings.lora is not None:
        raise UserError("--lora needs the whole model in each process; use --parallel ddp, or leave --lora out")
    if before and (changes := differences(before, runtime.to_dict())):
        run.event(f"not the same machine or choices as before, so not the same rounding: {'; '.join(changes)}")
    return runtime


def _check_room(plan: Plan, config: ModelConfig, runtime: Runtime, run: Run, available: int) -> None:
    """Refuse what cannot fit before anything is built: the model with its optimizer, and the checkpoints."""
    remedy = "try a smaller --preset" + (", or more processes" if runtime.sharded else "")
    needed = with_margin(model_and_optimizer_bytes(config, runtime, plan), 0)
    check_memory(needed, available, f"that is the model and its optimizer alone: {remedy}")
    if processes.is_rank_zero():
        saved = len(checkpoint.list_checkpoints(run.checkpoints))
        orthogonalized = count_orthogonalized(config) if plan.muon else 0
        n_bytes = checkpoint_bytes(count_parameters(config), orthogonalized)
        check_disk(run.path, n_bytes, plan.keep_checkpoints, saved)
