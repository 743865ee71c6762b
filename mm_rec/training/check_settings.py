"""Checks settings before any data are read, which may take hours: all that no data can make right is refused here."""

from __future__ import annotations

from collections.abc import Sequence

from mm_rec import ops, processes
from mm_rec.errors import UserError
from mm_rec.machine.device import check_threads, select_device
from mm_rec.stages import STAGES
from mm_rec.storage.hub.models import find_model
from mm_rec.training.initial_weights import require_run_before
from mm_rec.training.plan import make_plan
from mm_rec.training.settings import TrainSettings

__all__ = ["check_settings"]


def check_settings(settings: TrainSettings, stages: Sequence[str]) -> None:
    """Refuse settings of these ``stages``, run in a row, that can't be trained with whatever the data are.

    Raises:
        UserError: if a device, number of threads, size or variable of the environment can't be, or what the first
            stage starts from is not there.
    """
    ops.status()  # which back end, level and threads the environment asks for
    for name in stages:
        one = settings.for_stage(name)
        check_threads(one.threads)
        plan = make_plan(one, select_device(one.device).type, tokens_per_epoch=1)
        processes.check_rows(plan.batch_size)
    first = settings.for_stage(stages[0])
    named = first.resume_from or first.init_from
    if named is not None:
        if named is first.init_from and processes.is_rank_zero():  # no other process reads it
            named = find_model(named)
        if processes.is_rank_zero() and not named.exists():
            raise UserError("there is no {named}; name a run folder or a checkpoint", named=named)
    elif STAGES[first.stage].follows is not None:
        require_run_before(first.checkpoint_dir, first.stage)
    else:
        first.model_config()
