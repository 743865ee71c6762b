"""Checkpoints: folders in the layout of Hugging Face, with what training needs beside it.

    config.json  generation_config.json  model.safetensors         the model, weights in float32
    modeling_mm_rec.py                                             for transformers with trust_remote_code
    tokenizer.json  tokenizer_config.json  chat_template.jinja     the tokenizer
    optimizer.safetensors  carried.safetensors  trainer.json       the training: moments, carried state, the rest
    manifest.json                                                  size and SHA-256 of every file above

A checkpoint is written whole or not at all, never changed afterwards, and read only if every byte is what was
written. There is no pickle in it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mm_rec.config import ModelConfig
from mm_rec.errors import UserError
from mm_rec.formats import KEY, VERSIONS, take_version
from mm_rec.storage import files, hf_folder
from mm_rec.text.tokenizer import Tokenizer

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Event",
    "check_shape",
    "checkpoint_name",
    "checkpoint_step",
    "list_checkpoints",
    "load",
    "load_newest",
    "newest_valid",
    "prune",
    "resolve",
    "save",
    "set_aside",
]

MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json")
TRAINING_FILES = ("optimizer.safetensors", "carried.safetensors", "trainer.json")
SMALL_FILES_BYTES = 16_000_000
"""Room for all files but the tensors; a tokenizer of 32,000 tokens takes 2.5 MB."""

_BLOCK = re.compile(r"experts\.[^.]+\.blocks\.\d+")

MAX_JSON_BYTES = 64_000_000
"""Far above the size of any JSON file of a checkpoint."""

_LONGEST_REASON = 300

Event = Callable[[str], None]
T = TypeVar("T")


class CheckpointError(UserError):
    """A checkpoint cannot be used; the message names the file that is missing or damaged."""


@dataclass(frozen=True)
class Checkpoint:
    """What :func:`load` read.

    Attributes:
        path: the folder.
        config: shape of the model.
        weights: by parameter name, float32.
        optimizer: as from ``AdamW.state_tensors``; empty if only the weights were asked for, as are the next two.
        carried: state carried from one step to the next, as from ``flatten_state``.
        trainer: step, random state, schedule and whatever else the trainer keeps.
        tokenizer_dir: for ``Tokenizer.load``.
    """

    path: Path
    config: ModelConfig
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    carried: Mapping[str, Tensor]
    trainer: dict[str, Any]
    tokenizer_dir: Path


def save(
    path: Path,
    *,
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    carried: Mapping[str, Tensor],
    trainer: Mapping[str, Any],
    tokenizer: Tokenizer,
) -> None:
    """Write the checkpoint ``path``, which must not exist yet.

    Args:
        path: the folder to make.
        config: shape of the model.
        weights: master weights by parameter name.
        optimizer, carried: named tensors; may be empty.
        trainer: values that JSON can hold.
        tokenizer: that of the model.

    Raises:
        StorageError: if the disk is full, broken or not writable. Nothing is left over, and no earlier
            checkpoint is touched.
    """
    tensors = {"model": weights, "optimizer": optimizer, "carried": carried}
    n_bytes = sum(tensor.nbytes for group in tensors.values() for tensor in group.values())
    with files.atomic_folder(path, n_bytes + SMALL_FILES_BYTES) as folder:
        hf_folder.write_model_files(folder, config, tokenizer, hf_folder.default_domain(config, weights))
        _write_json(folder / "trainer.json", {KEY: VERSIONS["training"], **trainer})
        for name, group in tensors.items():
            _write_tensors(folder / f"{name}.safetensors", group)


def load(path: Path, *, weights_only: bool = False) -> Checkpoint:
    """Read a checkpoint after comparing every file with the manifest.

    Args:
        path: the checkpoint's folder.
        weights_only: leave out what only training needs.

    Raises:
        CheckpointError: naming the file that is missing or damaged.
        FormatError: if it is whole but of another version of its format.
    """
    path = Path(path)
    _verify(path, weights_only)
    values = _read_json(path / "config.json", "model")
    trainer = {} if weights_only else _read_json(path / "trainer.json", "training")
    with _reading(path / "config.json"):
        known = {field.name for field in dataclasses.fields(ModelConfig)}
        config = ModelConfig.from_dict({name: value for name, value in values.items() if name in known})
    return Checkpoint(
        path=path,
        config=config,
        weights=_read_tensors(path / "model.safetensors"),
        optimizer={} if weights_only else _read_tensors(path / "optimizer.safetensors"),
        carried={} if weights_only else _read_tensors(path / "carried.safetensors"),
        trainer=trainer,
        tokenizer_dir=path,
    )


def check_shape(found: Checkpoint) -> None:
    """Compare the configuration of a checkpoint with its weights, so that no model is built that they do not fill.

    Raises:
        CheckpointError: if the weights are those of another model, or not in float32.
    """
    config, weights = found.config, found.weights
    odd = sorted({str(tensor.dtype) for tensor in weights.values() if tensor.dtype != torch.float32})
    if odd:
        raise CheckpointError(f"{found.path} has weights of type {odd[0]}; a checkpoint's are torch.float32")
    embedding = weights.get("embedding.weight")
    blocks = {f"experts.{name}.blocks.{index}" for name in config.experts for index in range(config.n_layers)}
    if (
        {match[0] for match in map(_BLOCK.match, weights) if match} != blocks
        or embedding is None
        or embedding.shape != (config.vocab_size, config.d_model)
    ):
        raise CheckpointError(f"the weights in {found.path} are not of the model in its config.json")


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint of a step: ``step_000050``."""
    return f"step_{step:06d}"


def checkpoint_step(path: Path) -> int:
    """The step of a checkpoint by its folder name; -1 if that is not one of :func:`checkpoint_name`."""
    match = re.fullmatch(r"step_(\d{6,18})", path.name)
    return int(match[1]) if match else -1


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, oldest step first, valid or not."""
    found = [path for path in Path(folder).glob("step_*") if checkpoint_step(path) >= 0 and path.is_dir()]
    return sorted(found, key=checkpoint_step)


def load_newest(folder: Path, on_event: Event | None = None) -> Checkpoint | None:
    """Load the valid checkpoint of the highest step in ``folder``; each one passed over is told to ``on_event``."""
    return _newest(folder, load, on_event)


def newest_valid(folder: Path, on_event: Event | None = None) -> Path | None:
    """Where the checkpoint of :func:`load_newest` is; its files are compared with the manifest, not loaded."""

    def checked(path: Path) -> Path:
        _verify(path, weights_only=False)
        return path

    return _newest(folder, checked, on_event)


def _newest(folder: Path, read: Callable[[Path], T], on_event: Event | None) -> T | None:
    for path in reversed(list_checkpoints(folder)):
        try:
            return read(path)
        except CheckpointError as error:
            if on_event is not None:
                on_event(f"passed over a checkpoint: {error}")
    return None


def resolve(path: Path, on_event: Event | None = None) -> Path:
    """The checkpoint that a user means by ``path``: itself a checkpoint, or a run folder with checkpoints.

    Raises:
        CheckpointError: if there is none.
    """
    path = Path(path)
    if (path / "checkpoints").is_dir():
        newest = newest_valid(path / "checkpoints", on_event)
        if newest is None:
            raise CheckpointError(f"{path} has no valid checkpoint yet")
        return newest
    if not (path / files.MANIFEST).is_file():
        raise CheckpointError(f"{path} is neither a run folder nor a checkpoint: it has no {files.MANIFEST}")
    return path


def prune(folder: Path, keep_last: int) -> list[Path]:
    """Remove old checkpoints, and old ones that :func:`set_aside` has renamed; returns them.

    Args:
        folder: of checkpoints.
        keep_last: how many to keep of either, at least 1.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last must be at least 1, got {keep_last}")
    aside = sorted(
        (path for path in folder.glob("step_*.damaged*") if path.is_dir()), key=lambda path: path.stat().st_mtime
    )
    removed = [*list_checkpoints(folder)[:-keep_last], *aside[:-keep_last]]
    for path in removed:
        files.remove_folder(path)
    return removed


def set_aside(path: Path) -> Path:
    """Free the name of a damaged checkpoint without deleting it; returns its new path."""
    number, target = 1, path.with_name(f"{path.name}.damaged")
    while target.exists():
        number += 1
        target = path.with_name(f"{path.name}.damaged-{number}")
    with files.reporting_errors(target):
        path.rename(target)
    return target


def _verify(path: Path, weights_only: bool) -> None:
    try:
        names = files.verify_folder(path, skip=TRAINING_FILES if weights_only else ())
    except files.DamageError as error:
        raise CheckpointError(str(error)) from error
    needed = MODEL_FILES if weights_only else MODEL_FILES + TRAINING_FILES
    missing = [name for name in needed if name not in names]
    if missing:  # another version may have other files
        for name, kind in (("config.json", "model"), ("trainer.json", "training")):
            if name in names and name in needed:
                _read_json(path / name, kind)
    if missing and missing[0] in TRAINING_FILES:
        raise CheckpointError(
            f"{path} holds a model without the state of its training ({missing[0]} is not in its manifest): "
            "--init_from starts a new run from its weights"
        )
    if missing:
        raise CheckpointError(f"{path / missing[0]} is not in the manifest")


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file without copying what already lies on the CPU in one piece."""
    flat = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(flat, path, metadata={"format": "pt"})
    except SafetensorError as error:
        # The library gives the system's error as text only.
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), str(error), str(path)) from error
    path.chmod((path.parent / "config.json").stat().st_mode)  # the library makes it private


def _read_json(path: Path, kind: str) -> dict[str, Any]:
    """The values of a JSON file that states the version of the format ``kind``."""
    with _reading(path):
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"it has more than {MAX_JSON_BYTES // 1_000_000} MB")
        return take_version(kind, json.loads(path.read_bytes()), path)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Name the file in any error of what should be a sound file by its hash."""
    try:
        yield
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be used: {str(error)[:_LONGEST_REASON]}") from error


def _read_tensors(path: Path) -> dict[str, Tensor]:
    with _reading(path):
        tensors: dict[str, torch.Tensor] = load_file(path)
    return tensors
