"""What a stage starts from: the checkpoint before it, the shape of its model, and the identity that follows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mm_rec.config import ModelConfig
from mm_rec.data.prepared import Prepared
from mm_rec.errors import UserError
from mm_rec.stages import STAGES
from mm_rec.storage import checkpoint
from mm_rec.storage.best import best_or_newest, resolve, stopped_early
from mm_rec.storage.hub.models import find_model
from mm_rec.storage.run_config import differences, list_runs, require_configs
from mm_rec.training.plan import Plan
from mm_rec.training.runtime import choose_runtime
from mm_rec.training.settings import TrainSettings, step_cap
from mm_rec.translation import Translatable, join_texts

__all__ = ["StartingPoint", "find_starting_point", "require_run_before", "starting_checkpoint"]


class StartingPoint(NamedTuple):
    """What a stage starts from.

    Attributes:
        config: the shape of the model.
        weights: the best weights of the stage before, or those named by ``init_from``; None for new ones.
        identity: all that decides the result of the run; runs of one identity are the same run.
        path: the checkpoint that is started from or gone on with; None for new weights.
    """

    config: ModelConfig
    weights: Mapping[str, Tensor] | None
    identity: dict[str, Any]
    path: Path | None


class _Weights(NamedTuple):
    """A checkpoint that gives its weights: where it is, its shape, the weights, and the hash of its manifest."""

    path: Path
    config: ModelConfig
    weights: Mapping[str, Tensor]
    sha256: str


def find_starting_point(settings: TrainSettings, plan: Plan, data: Prepared, device: torch.device) -> StartingPoint:
    """Returns what the stage of ``settings`` starts from.

    Raises:
        UserError: if the checkpoint is missing, of another tokenizer, domain or shape, or would be rounded otherwise.
    """
    named = checkpoint.load(checkpoint.resolve(settings.resume_from)) if settings.resume_from else None
    start = None if named else _load_weights(settings, data)
    if named is not None:
        checkpoint.check_shape(named)
        config = named.config
        _check_shape(settings, config, Translatable("{path} is", path=settings.resume_from))
        _check_tokenizer(named, data, settings.resume_from)
        starts_from = named.trainer["run"]["identity"]["starts_from"]
        _check_rounding(settings, named, device)
    else:
        config = _model_config(settings, data, start)
        starts_from = start and start.sha256
    identity = {
        **plan.identity(),
        "device": device.type,
        "precision": settings.precision,
        "threads": settings.threads,
        "data": data.data_sha256,
        "tokenizer": data.tokenizer.sha256,
        "starts_from": starts_from,
        "model": config.to_dict(),
    }
    path = named.path if named is not None else start and start.path
    return StartingPoint(config, start and start.weights, identity, path)


def starting_checkpoint(settings: TrainSettings) -> Path | None:
    """Returns the checkpoint whose weights a stage starts from: the one named, else the best of the stage before.

    None for the first stage, which starts from new weights.

    Raises:
        UserError: if there is no such checkpoint, or the stage before is not finished.
    """
    if settings.init_from is not None:
        return resolve(find_model(settings.init_from), _refuse)
    before = _stage_before(settings.checkpoint_dir, settings.stage)
    return _final_checkpoint(settings.checkpoint_dir, before, settings.stage) if before else None


def _stage_before(root: Path, stage: str) -> str | None:
    """The stage whose weights ``stage`` starts from. One that fuses experts is passed over where there is only one."""
    before = STAGES[stage].follows
    if before is not None and STAGES[before].fuses and _has_one_expert(root, before):
        return STAGES[before].follows
    return before


def _has_one_expert(root: Path, stage: str) -> bool:
    """Whether what stands before ``stage`` has one expert, so that there is nothing to fuse."""
    before = STAGES[stage].follows
    if before is None or not root.is_dir() or list_runs(root, stage):
        return False
    runs = [config for _, _, config in list_runs(root, before) if config is not None]
    return bool(runs) and len(runs[-1]["identity"]["model"]["experts"]) == 1


def _refuse(passed_over: str) -> None:
    """Refuse other weights than the newest, from which another run would come out unnoticed."""
    raise UserError("{passed_over}; name the checkpoint to start from with --init_from", passed_over=passed_over)


def _load_weights(settings: TrainSettings, data: Prepared) -> _Weights | None:
    """The weights that a stage starts from; None for new ones."""
    path = starting_checkpoint(settings)
    if path is None:
        return None
    found = checkpoint.load(path, weights_only=True)
    checkpoint.check_shape(found)
    _check_tokenizer(found, data, path)
    return _Weights(path, found.config, found.weights, found.sha256)


def require_run_before(root: Path, stage: str) -> None:
    """Refuse a ``stage`` that starts from another of which there is no run in ``root``, or one that cannot be told."""
    before = _stage_before(root, stage)
    if before is not None:
        _newest_run(root, before, stage)


def _newest_run(root: Path, stage: str, following: str) -> Path:
    """The newest run of ``stage``, from whose weights the stage ``following`` starts; an error if there is none."""
    found = list_runs(root, stage) if root.is_dir() else []
    require_configs(found)
    runs = [path for _, path, config in found if config is not None]
    if not runs:
        raise UserError(
            "{following} starts from a trained {stage} and there is none in {root}; run "
            "`{command}` first, or name a checkpoint with --init_from",
            following=following,
            stage=stage,
            root=root,
            command=_command(stage),
        )
    return runs[-1]


def _final_checkpoint(root: Path, stage: str, following: str) -> Path:
    """The best checkpoint of the newest run of ``stage``; an error if that run is not finished."""
    run = _newest_run(root, stage, following)
    newest = checkpoint.load_newest(run / "checkpoints")
    if newest is None:
        raise UserError(
            "{run} has no checkpoint yet; go on with `{command}`, or name the checkpoint that "
            "{following} starts from with --init_from",
            run=run,
            command=_command(stage),
            following=following,
        )
    done, steps = newest.trainer["step"], min(newest.trainer["steps"], step_cap() or newest.trainer["steps"])
    if done < steps and stopped_early(run) != done:
        raise UserError(
            "{run} is not finished ({done} of {steps} steps); go on with `{command}`, or start "
            "{following} from what is there with --init_from {run}",
            run=run,
            done=done,
            steps=steps,
            command=_command(stage),
            following=following,
        )
    return best_or_newest(run, _refuse) or newest.path


def _command(stage: str) -> str:
    """The command that trains a stage."""
    return f"mm-rec finetune --task {stage}" if STAGES[stage].conversations else f"mm-rec train --stage {stage}"


def _model_config(settings: TrainSettings, data: Prepared, start: _Weights | None) -> ModelConfig:
    """The shape of the weights if there are any, else that of the settings with the vocabulary of the tokenizer."""
    if start is None:
        config = settings.model_config(data.tokenizer.padded_vocab_size, tuple(data.train))
    else:
        config = start.config
        _check_shape(
            settings, config, Translatable("{stage} starts from {path},", stage=settings.stage, path=start.path)
        )
    unknown = sorted(set(data.train) - set(config.experts))
    if unknown and not STAGES[settings.stage].conversations:
        raise UserError(
            "there is data of {unknown}, but the model's experts are {experts}",
            unknown=unknown[0],
            experts=", ".join(config.experts),
        )
    return config


def _check_tokenizer(found: checkpoint.Checkpoint, data: Prepared, path: Path | None) -> None:
    """Refuse a checkpoint, named by ``path``, whose tokens are not those of the data."""
    if found.load_tokenizer().sha256 != data.tokenizer.sha256:
        raise UserError(
            "{path} was trained with another tokenizer than that of the data; use the same "
            "--data_dir, --preset, --vocab_size and --max_samples as for it, or train the stages "
            "before anew",
            path=path,
        )


def _check_shape(settings: TrainSettings, config: ModelConfig, what: str) -> None:
    """Refuse a size that is asked for where the model has another; the vocabulary is compared by the tokenizer."""
    for name, value in settings.model_shape().items():
        if name != "vocab_size" and value != getattr(config, name):
            raise UserError(
                "{what} a model whose {name} is {has}, not {value}; leave out {name}, or train a "
                "model of that size anew",
                what=what,
                name=name,
                has=getattr(config, name),
                value=value,
            )


def _check_rounding(settings: TrainSettings, named: checkpoint.Checkpoint, device: torch.device) -> None:
    """Refuse to go on with a checkpoint that is asked for by name where the rounding would differ unnoticed."""
    before = named.trainer["runtime"]
    changes = differences(before, choose_runtime(settings, device, before).to_dict())
    if changes and not settings.allow_changes:
        raise UserError(
            "{resume_from} would not go on with the same rounding: {changes}. --allow_changes accepts that",
            resume_from=settings.resume_from,
            changes=join_texts("; ", changes),
        )
