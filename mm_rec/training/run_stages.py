"""From settings and data to trained stages: a few functions in a row for each stage."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
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
from mm_rec.stages import STAGES
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
from mm_rec.training.initial_weights import StartingPoint, find_starting_point, starting_checkpoint
from mm_rec.training.pace import Pace
from mm_rec.training.plan import Plan, make_plan
from mm_rec.training.ranks import NoRunFolder, StageStart, broadcast_path, broadcast_start
from mm_rec.training.run_estimate import RunEstimate, announce, estimate_run
from mm_rec.training.runtime import (
    Runtime,
    agree_on_runtime,
    choose_runtime,
    memory_of_process,
    model_and_optimizer_bytes,
)
from mm_rec.training.settings import TrainSettings
from mm_rec.translation import Translatable, join_texts

__all__ = ["train_stages"]

Lengths = Sequence[tuple[int, int, float]]
"""What was decided about the length of a run with a time budget, as :attr:`RunFolder.lengths` has it."""


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
    path = _run_or_skip(settings.for_stage(first), data, guard, console)
    for name in others:
        guard.check()
        following = dataclasses.replace(settings.for_stage(name), init_from=path, resume_from=None)
        path = _run_or_skip(following, data, guard, console)
    return path


def _run_or_skip(settings: TrainSettings, data: Prepared, guard: SignalGuard, console: Console) -> Path:
    """Train one stage, or pass over it if it fuses experts and the model has one; returns the final checkpoint."""
    if STAGES[settings.stage].fuses and settings.resume_from is None:
        path = _checkpoint_of_one_expert(settings) if processes.is_rank_zero() else None
        skipped = processes.broadcast_json(None if path is None else str(path))
        if skipped is not None:
            say(
                console,
                Translatable(
                    "{stage} is skipped: the model has one domain, so there is nothing to fuse", stage=settings.stage
                ),
            )
            return Path(skipped)
    return _run_stage(settings, data, guard, console)


def _checkpoint_of_one_expert(settings: TrainSettings) -> Path | None:
    """The checkpoint that the stage starts from, if its model has a single expert; else None."""
    path = starting_checkpoint(settings)
    return path if path is not None and len(checkpoint.read_config(path).experts) == 1 else None


def _run_stage(settings: TrainSettings, data: Prepared, guard: SignalGuard, console: Console) -> Path:
    """Train one stage, or find it finished; returns its final checkpoint."""
    started = time.monotonic()
    device = select_device(settings.device)
    plan_of = functools.partial(_plan, settings, device, data)
    plan = plan_of()
    data = _with_recall_rows(settings, plan, data, console)
    processes.check_rows(plan.batch_size)
    point = find_starting_point(settings, plan, data, device) if processes.is_rank_zero() else None
    available = memory_of_process(device)  # before anything of the run is loaded
    with NoRunFolder() if point is None else _open_run(settings, plan, point, console) as run:
        start = broadcast_start(None if point is None else _read_start(run, plan_of, point))
        plan = plan_of(start.lengths)
        if start.finished is not None:
            say(
                console,
                Translatable(
                    "{stage} is finished: {finished}; more --max_steps continue it, --fresh starts anew",
                    stage=settings.stage,
                    finished=start.finished,
                ),
            )
            return start.finished
        runtime = _choose_runtime(settings, plan, start, run, device, available)
        _check_room(plan, start.config, runtime, run, available)
        pace = None
        if plan.minutes is not None:
            pace = Pace(60 * plan.minutes, start.lengths[-1][2] if start.lengths else 0.0, started)
        trainer = build_trainer(settings, plan, start, data, runtime, device, run, guard, console, pace)
        if start.checkpoint is not None:
            trainer.restore(start.checkpoint)
        saved, lengths = start.checkpoint.trainer if start.checkpoint else None, start.lengths
        del start, point  # the weights that they hold are in the model
        estimate = estimate_run(trainer, settings.gradient_checkpointing, available)
        first = None
        if pace is not None and not lengths:
            first = _first_length(pace, estimate)
            trainer.plan = plan_of([first])
        announce(console, trainer, data, estimate)
        if isinstance(run, RunFolder):  # nothing that cannot be undone comes before all that can refuse
            cut_back(run, saved)
            if first is not None:
                run.note_length(*first)
        path = trainer.fit()
    path = broadcast_path(path)
    say(
        console,
        Translatable(
            "{stage}: {step} steps done, saved in {path}", stage=settings.stage, step=trainer.progress.step, path=path
        ),
    )
    return path


def _plan(settings: TrainSettings, device: torch.device, data: Prepared, lengths: Lengths = ()) -> Plan:
    """The plan of a stage, with what was decided about its length."""
    tokens = sum(store.n_tokens for store in data.train.values())
    if not lengths:
        return make_plan(settings, device.type, tokens)
    (_, steps, _), *later = lengths
    plan = make_plan(settings, device.type, tokens, fitting_steps=steps)
    return plan.with_revisions((step, steps) for step, steps, _ in later)


def _first_length(pace: Pace, estimate: RunEstimate) -> tuple[int, int, float]:
    """How many steps fit into the time, before the first; rank 0 decides for all."""
    steps = max(1, int(pace.left / estimate.seconds_per_step))
    return 0, processes.broadcast_json(steps), pace.used


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


def _read_start(run: Run, plan_of: Callable[[Lengths], Plan], point: StartingPoint) -> StageStart:
    """What rank 0 finds in its run folder: a finished run, a checkpoint, or nothing yet."""
    assert isinstance(run, RunFolder), "rank 0 owns the run folder"
    if finished := _finished(run, plan_of(run.lengths)):
        return StageStart(point.config, finished=finished)
    return StageStart(point.config, point.weights, find_newest(run), lengths=run.lengths)


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
        run.event(
            Translatable(
                "not the same machine or choices as before, so not the same rounding: {changes}",
                changes=join_texts("; ", changes),
            )
        )
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
