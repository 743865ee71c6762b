"""Tasks of the LM Evaluation Harness (lm-eval) on a checkpoint, through its own ``hf`` model, unmodified."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mm_rec.errors import MissingPackageError, UserError

__all__ = ["run_harness"]


def run_harness(
    path: Path,
    tasks: Sequence[str],
    *,
    task_dir: Path | None = None,
    domain: str | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    device: str = "cpu",
    precision: str = "fp32",
) -> dict[str, dict[str, float]]:
    """Run tasks; returns the numbers of each by name, such as ``acc`` and ``acc_stderr``.

    Args:
        path: a checkpoint or an exported folder.
        tasks: names that lm-eval knows, or those of files in ``task_dir``.
        task_dir: folder of task files (YAML).
        domain: the expert that answers; None fuses all.
        limit: questions of each task; None for all.
        batch_size: questions at a time.
        device: as `torch` names it.
        precision: ``fp32`` or ``bf16``.

    Raises:
        UserError: if lm-eval is not installed or knows no such task.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise MissingPackageError("--tasks", "lm_eval") from None
    import mm_rec.hf  # noqa: F401 (registers the model)

    manager = TaskManager(include_path=None if task_dir is None else str(task_dir))
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise UserError(
            "lm-eval knows no task {unknown!r}; `lm-eval ls tasks` lists them, --task_dir adds own ones",
            unknown=unknown[0],
        )
    results: dict[str, dict[str, float]] = {}
    for rolling in (False, True):
        chosen = [task for task in tasks if _scores_whole_texts(manager, task) == rolling]
        if not chosen:
            continue
        # Where lm-eval scores a whole text it puts BOS before it itself, and would score a second one.
        own_bos = {"add_bos_token": False} if rolling else {}
        found = lm_eval.simple_evaluate(
            model="hf",
            model_args={
                "pretrained": str(path),
                "dtype": {"fp32": "float32", "bf16": "bfloat16"}[precision],
                "domain": "all" if domain is None else domain,
                **own_bos,
            },
            tasks=chosen,
            task_manager=manager,
            limit=limit,
            batch_size=batch_size,
            device=device,
            bootstrap_iters=0,
        )
        results |= {task: _numbers(values) for task, values in found["results"].items()}
    return results


def _scores_whole_texts(manager: Any, task: str) -> bool:
    """Whether a task, or a task of a group, scores whole texts and not answers to a context."""
    return any("rolling" in one.OUTPUT_TYPE for one in manager.load([task])["tasks"].values())


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """The finite numbers among a task's results; ``acc,none`` is named ``acc``."""
    named = {name.removesuffix(",none"): value for name, value in values.items()}
    return {
        name: float(value)
        for name, value in named.items()
        if isinstance(value, int | float) and math.isfinite(value) and name != "sample_len"
    }
