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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mm_rec import system
from mm_rec.config import ModelConfig
from mm_rec.errors import UserError
from mm_rec.formats import KEY, VERSIONS, take_version
from mm_rec.regular_file import read_regular
from mm_rec.storage import adapter as adapters
from mm_rec.storage import files, hf_folder
from mm_rec.storage.reading import read_file, read_tensors
from mm_rec.text.tokenizer import Tokenizer
from mm_rec.translation import Translatable

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Event",
    "check_shape",
    "checkpoint_name",
    "checkpoint_step",
    "is_of_a_run",
    "list_checkpoints",
    "load",
    "load_newest",
    "newest_valid",
    "prune",
    "read_config",
    "require_own_model",
    "resolve",
    "save",
    "set_aside",
    "stage_of",
    "started_from",
    "verify",
    "write_tensors",
]

MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json")
TRAINER = "trainer.json"
TRAINING_FILES = ("optimizer.safetensors", "carried.safetensors", TRAINER)
SMALL_FILES_BYTES = 16_000_000
"""Room for all files but the tensors; a tokenizer of 32,000 tokens takes 2.5 MB."""

_BLOCK = re.compile(r"experts\.[^.]+\.blocks\.\d+")

MAX_FILE_BYTES = 256_000_000
"""Far above the size of any file of a checkpoint but the tensors."""

_LONGEST_REASON = 300

Event = Callable[[str], None]
T = TypeVar("T")


class CheckpointError(UserError):
    """A checkpoint cannot be used; the message names the file that is missing or damaged."""


@dataclass(frozen=True)
class Checkpoint:
    """What :func:`load` read. All of it is in memory: what becomes of the files later does not change it.

    Attributes:
        path: the folder.
        sha256: of its manifest, which holds the hashes of all files.
        config: shape of the model.
        weights: by parameter name, float32.
        optimizer: as from ``AdamW.state_tensors``; empty if only the weights were asked for, as are the next two.
        carried: state carried from one step to the next, as from ``flatten_state``.
        trainer: step, random state, schedule and whatever else the trainer keeps.
        tokenizer_json: content of ``tokenizer.json``, for :meth:`load_tokenizer`.
        domain: the default domain, an expert; None fuses all.
    """

    path: Path
    sha256: str
    config: ModelConfig
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    carried: Mapping[str, Tensor]
    trainer: dict[str, Any]
    tokenizer_json: bytes
    domain: str | None = None

    def load_tokenizer(self) -> Tokenizer:
        """Returns the tokenizer of the model; raises UserError if the file holds none."""
        return Tokenizer.parse(self.tokenizer_json, self.path / "tokenizer.json")


def save(
    path: Path,
    *,
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    carried: Mapping[str, Tensor],
    trainer: Mapping[str, Any],
    tokenizer: Tokenizer,
    adapter: Mapping[str, tuple[Tensor, Tensor, float]] | None = None,
) -> None:
    """Write the checkpoint ``path``, which must not exist yet.

    Args:
        path: the folder to make.
        config: shape of the model.
        weights: master weights by parameter name.
        optimizer, carried: named tensors; may be empty.
        trainer: values that JSON can hold.
        tokenizer: that of the model.
        adapter: of a run that trains adapters, A, B and s of each by parameter name, kept beside the merged weights.

    Raises:
        StorageError: if the disk is full, broken or not writable. Nothing is left over, and no earlier
            checkpoint is touched.
    """
    tensors = {"model": weights, "optimizer": optimizer, "carried": carried}
    n_bytes = sum(tensor.nbytes for group in tensors.values() for tensor in group.values())
    with files.atomic_folder(path, n_bytes + SMALL_FILES_BYTES) as folder:
        hf_folder.write_model_files(folder, config, tokenizer, hf_folder.default_domain(config, weights))
        _write_json(folder / TRAINER, {KEY: VERSIONS["training"], **trainer})
        for name, group in tensors.items():
            write_tensors(folder / f"{name}.safetensors", group)
        if adapter:
            _write_adapter(folder / adapters.ADAPTER_FOLDER, adapter)


def _write_adapter(folder: Path, adapter: Mapping[str, tuple[Tensor, Tensor, float]]) -> None:
    """Write what was trained as an adapter of PEFT."""
    config, tensors = adapters.adapter_files({name: adapters.LowRank(*one) for name, one in adapter.items()})
    folder.mkdir()
    _write_json(folder / adapters.CONFIG, config)
    write_tensors(folder / adapters.WEIGHTS, tensors, like=folder / adapters.CONFIG)


def load(path: Path, *, weights_only: bool = False) -> Checkpoint:
    """Read a checkpoint and compare every byte that is used with the manifest.

    Args:
        path: the checkpoint's folder.
        weights_only: leave out what only training needs.

    Raises:
        CheckpointError: naming the file that is missing or damaged.
        FormatError: if it is whole but of another version of its format.
    """
    path = Path(path)
    if hf_folder.is_saved_by_transformers(path):
        return _load_saved_by_transformers(path, weights_only)
    try:
        entries = files.read_manifest(path)
        _check_names(path, entries, weights_only)
        names = [name for name in entries if not (weights_only and name in TRAINING_FILES)]
        with ThreadPoolExecutor(files.HASH_THREADS) as pool:
            contents = dict(zip(names, pool.map(lambda name: _read(path / name, entries[name]), names), strict=True))
    except files.DamageError as error:
        raise CheckpointError("{problem}", problem=error) from error
    values = _parse_json(path / "config.json", "model", contents["config.json"])
    trainer = {} if weights_only else _parse_json(path / TRAINER, "training", contents[TRAINER])
    config = _model_config(path, values)
    weights = hf_folder.checkpoint_names(contents["model.safetensors"])
    return Checkpoint(
        path=path,
        sha256=files.manifest_sha256(entries),
        config=config,
        weights=weights,
        optimizer={} if weights_only else contents["optimizer.safetensors"],
        carried={} if weights_only else contents["carried.safetensors"],
        trainer=trainer,
        tokenizer_json=contents["tokenizer.json"],
        domain=_default_domain(path, values, config, weights),
    )


def _load_saved_by_transformers(path: Path, weights_only: bool) -> Checkpoint:
    """Read a model that `transformers` or a tool around it saved; there are no hashes to compare it with."""
    try:
        small = [path / "config.json", path / "tokenizer.json"]
        for file in small:
            _check_size(file, file.stat().st_size)
        configuration, tokenizer = (read_regular(file) for file in small)
    except OSError as error:
        raise CheckpointError(
            "{path} cannot be used: {filename} cannot be read ({reason}); a tokenizer is "
            "written there with tokenizer.save_pretrained({folder!r})",
            path=path,
            filename=error.filename,
            reason=error.strerror,
            folder=str(path),
        ) from error
    values = _parse_own_config(path, configuration)
    if not weights_only:
        raise _no_training_state(path, Translatable("transformers saved it"))
    config = _model_config(path, values)
    weights, sha256 = hf_folder.read_saved_weights(path)
    domain = _default_domain(path, values, config, weights)
    return Checkpoint(path, sha256, config, weights, {}, {}, {}, tokenizer, domain)


def _parse_own_config(path: Path, content: bytes) -> dict[str, Any]:
    """Returns what is in the ``config.json`` of a model of this package, in a folder without a manifest."""
    values = _parse_json(path / "config.json", "model", content)
    if values.get("model_type") != "mm_rec":
        raise CheckpointError(
            "{path} holds a model of type {kind!s:.80}, not one of MM-Rec", path=path, kind=values.get("model_type")
        )
    return values


def require_own_model(path: Path) -> None:
    """Compare the ``config.json`` in ``path`` with what this version reads, before its weights are fetched.

    Raises:
        CheckpointError: if it is damaged, or the model of another kind.
        FormatError: if it is of another version of its format.
    """
    file = path / "config.json"
    _check_size(file, file.stat().st_size)
    _model_config(path, _parse_own_config(path, read_regular(file)))


def read_config(path: Path) -> ModelConfig:
    """Returns the shape of the model in a checkpoint, without a look at anything else of it.

    Raises:
        CheckpointError: if ``config.json`` is damaged.
    """
    file = path / "config.json"
    with _reading(file):
        return _model_config(path, _parse_json(file, "model", read_regular(file)))


def _model_config(path: Path, values: Mapping[str, Any]) -> ModelConfig:
    """The shape of the model among the ``values`` of ``config.json``."""
    with _reading(path / "config.json"):
        known = {field.name for field in dataclasses.fields(ModelConfig)}
        return ModelConfig.from_dict({name: value for name, value in values.items() if name in known})


def _default_domain(
    path: Path, values: Mapping[str, Any], config: ModelConfig, weights: Mapping[str, Tensor]
) -> str | None:
    """The default domain that ``config.json`` states; where it states none, the one that training has reached."""
    if "domain" not in values:
        return hf_folder.default_domain(config, weights)
    domain = None if values["domain"] == "all" else values["domain"]
    if domain is not None and domain not in config.experts:
        raise CheckpointError(
            "{path} cannot be used: there is no expert {domain!r:.80}", path=path / "config.json", domain=domain
        )
    return domain


def is_of_a_run(path: Path) -> bool:
    """Returns whether ``path`` is a checkpoint that a training wrote, not a folder for transformers."""
    return (path / TRAINER).is_file()


def started_from(path: Path) -> str | None:
    """Returns the ``sha256`` of the checkpoint that the training of ``path`` started from.

    None if it started from new weights, or ``path`` is no checkpoint of a training.
    """
    if not is_of_a_run(path):
        return None
    try:
        content = read_regular(path / TRAINER)
    except OSError as error:
        raise CheckpointError(
            "cannot read {path}: {reason}", path=path / TRAINER, reason=error.strerror or error
        ) from error
    with _reading(path / TRAINER):
        found: str | None = json.loads(content)["run"]["identity"]["starts_from"]
    return found


def stage_of(path: Path) -> str | None:
    """Returns the stage that trained a checkpoint of a run last; None for another folder, which does not say.

    Raises:
        CheckpointError: if the file is damaged.
    """
    if not is_of_a_run(path):
        return None
    with _reading(path / TRAINER):
        stage = json.loads(read_regular(path / TRAINER)).get("run", {}).get("stage")
    return stage if isinstance(stage, str) else None


def check_shape(found: Checkpoint) -> None:
    """Compare the configuration of a checkpoint with its weights, so that no model is built that they do not fill.

    Raises:
        CheckpointError: if the weights are those of another model, or not in float32.
    """
    config, weights = found.config, found.weights
    odd = sorted({str(tensor.dtype) for tensor in weights.values() if tensor.dtype != torch.float32})
    if odd:
        raise CheckpointError(
            "{path} has weights of type {dtype}; a checkpoint's are torch.float32", path=found.path, dtype=odd[0]
        )
    embedding = weights.get("embedding.weight")
    blocks = {f"experts.{name}.blocks.{index}" for name in config.experts for index in range(config.n_layers)}
    if (
        {match[0] for match in map(_BLOCK.match, weights) if match} != blocks
        or embedding is None
        or embedding.shape != (config.vocab_size, config.d_model)
    ):
        raise CheckpointError("the weights in {path} are not of the model in its config.json", path=found.path)


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
        verify(path)
        return path

    return _newest(folder, checked, on_event)


def _newest(folder: Path, read: Callable[[Path], T], on_event: Event | None) -> T | None:
    for path in reversed(list_checkpoints(folder)):
        try:
            return read(path)
        except CheckpointError as error:
            if on_event is not None:
                on_event(Translatable("passed over a checkpoint: {error}", error=error))
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
            raise CheckpointError("{path} has no valid checkpoint yet", path=path)
        return newest
    if not (path / files.MANIFEST).is_file() and not hf_folder.is_saved_by_transformers(path):
        raise CheckpointError(
            "{path} is neither a run folder nor a checkpoint: it has no {manifest}", path=path, manifest=files.MANIFEST
        )
    return path


def prune(folder: Path, keep_last: int, keep_step: int | None = None) -> list[Path]:
    """Remove old checkpoints, and old ones that :func:`set_aside` has renamed; returns them.

    Args:
        folder: of checkpoints.
        keep_last: how many to keep of either, at least 1.
        keep_step: the step of one that is kept in any case.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last must be at least 1, got {keep_last}")
    aside = sorted(
        (path for path in folder.glob("step_*.damaged*") if path.is_dir()), key=lambda path: path.stat().st_mtime
    )
    old = [path for path in list_checkpoints(folder)[:-keep_last] if checkpoint_step(path) != keep_step]
    removed = [*old, *aside[:-keep_last]]
    for path in list(removed):
        try:
            files.remove_folder(path)
        except files.InUseError:  # whoever reads it ends some time; the next call tries again
            removed.remove(path)
    return removed


def set_aside(path: Path) -> Path:
    """Free the name of a damaged checkpoint without deleting it; returns its new path."""
    number, target = 1, path.with_name(f"{path.name}.damaged")
    while target.exists():
        number += 1
        target = path.with_name(f"{path.name}.damaged-{number}")
    with files.reporting_errors(target):
        system.rename(path, target)
    return target


def verify(path: Path) -> None:
    """Compare a checkpoint with its manifest, without keeping anything of it.

    Raises:
        CheckpointError: naming the file that is missing or damaged.
    """
    try:
        files.verify_folder(path)
        _check_names(path, files.read_manifest(path), weights_only=False)
    except files.DamageError as error:
        raise CheckpointError("{problem}", problem=error) from error


def _check_names(path: Path, entries: Mapping[str, files.Entry], weights_only: bool) -> None:
    """Refuse a checkpoint whose manifest lacks a file that is needed."""
    needed = MODEL_FILES if weights_only else MODEL_FILES + TRAINING_FILES
    missing = [name for name in needed if name not in entries]
    if missing:  # another version may have other files
        for name, kind in (("config.json", "model"), (TRAINER, "training")):
            if name in entries and name in needed:
                _parse_json(path / name, kind, read_file(path / name, entries[name]))
    if missing and missing[0] in TRAINING_FILES:
        raise _no_training_state(path, Translatable("{missing} is not in its manifest", missing=missing[0]))
    if missing:
        raise CheckpointError("{path} is not in the manifest", path=path / missing[0])


def _no_training_state(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        "{path} holds a model without the state of its training ({reason}): --init_from "
        "starts a new run from its weights",
        path=path,
        reason=reason,
    )


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8", newline="\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], like: Path | None = None) -> None:
    """Write a safetensors file without copying what already lies on the CPU in one piece.

    Args:
        path: the file.
        tensors: what it holds, by name.
        like: a file whose permissions it gets; ``config.json`` beside it if None.
    """
    flat = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(flat, path, metadata={"format": "pt"})
    except SafetensorError as error:
        # The library gives the system's error as text only.
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), str(error), str(path)) from error
    path.chmod((like or path.parent / "config.json").stat().st_mode)  # the library makes it private


def _read(path: Path, entry: files.Entry) -> Any:
    """The tensors of a safetensors file, the bytes of any other."""
    with _reading(path):
        if path.suffix == ".safetensors":
            return read_tensors(path, entry)
        _check_size(path, int(entry["bytes"]))
        return read_file(path, entry)


def _check_size(path: Path, n_bytes: int) -> None:
    """Refuse a file that would take all memory and holds no tensors."""
    if n_bytes > MAX_FILE_BYTES:
        raise CheckpointError(
            "{path} has more than {megabytes} MB, which only tensors have",
            path=path,
            megabytes=MAX_FILE_BYTES // 1_000_000,
        )


def _parse_json(path: Path, kind: str, content: bytes) -> dict[str, Any]:
    """The values in the content of a JSON file that states the version of the format ``kind``."""
    with _reading(path):
        return take_version(kind, json.loads(content), path)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Name the file in any error of what is a sound file by its hash."""
    try:
        yield
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise CheckpointError(
            "{path} cannot be used: {error}", path=path, error=str(error)[:_LONGEST_REASON]
        ) from error
