"""LoRA adapters on the disk, in the layout of PEFT: low-rank changes of a model's matrices.

    adapter_config.json         rank, scale and which layers
    adapter_model.safetensors   two thin matrices A and B for each, by the names of the modules in `transformers`

A matrix W becomes W + s B A, with s = alpha / rank (Hu et al., arXiv 2106.09685). PEFT itself is not needed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from mm_rec.errors import UserError
from mm_rec.regular_file import read_regular
from mm_rec.storage.files import MANIFEST, DamageError, read_manifest
from mm_rec.storage.hf_folder import checkpoint_names, module_names
from mm_rec.storage.reading import read_file
from mm_rec.translation import Translatable

__all__ = ["ADAPTER_FOLDER", "CONFIG", "WEIGHTS", "LowRank", "adapter_files", "merged", "read_adapter"]

ADAPTER_FOLDER = "adapter"
"""In a checkpoint of a run that trains adapters, the folder that holds them."""
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_CONFIG_BYTES, MAX_WEIGHTS_BYTES = 1_000_000, 4_000_000_000
"""Beyond this it is no adapter; it is not read into memory."""

_PREFIX = "base_model.model."
_UNREADABLE = (
    OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, re.error, SafetensorError,
    DamageError,
)  # fmt: skip


class LowRank(NamedTuple):
    """The change s B A of a matrix: down A (rank, in), up B (out, rank) and the scale s."""

    down: Tensor
    up: Tensor
    scale: float

    def change(self) -> Tensor:
        """Returns s B A, (out, in)."""
        return self.scale * (self.up @ self.down)


@dataclass(frozen=True)
class AdapterSettings:
    """The parts of ``adapter_config.json`` that decide the scale."""

    alpha: float
    alphas: Mapping[str, float]
    by_root: bool

    def scale(self, module: str, rank: int) -> float:
        """Returns s of a module; names in ``alphas`` are patterns for the end of its name, as PEFT takes them."""
        alpha = next((v for k, v in self.alphas.items() if re.match(rf"(.*\.)?({k})$", module)), self.alpha)
        return alpha / (math.sqrt(rank) if self.by_root else rank)


def adapter_files(changes: Mapping[str, LowRank]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns what :data:`CONFIG` and :data:`WEIGHTS` hold for ``changes``, all of one rank and scale."""
    first = next(iter(changes.values()))
    rank = len(first.down)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": first.scale * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name in changes}),
        "inference_mode": True,
    }
    tensors = {}
    for name, one in changes.items():
        (weight,) = module_names({name: one.down})
        module = _PREFIX + weight.removesuffix(".weight")
        tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = one.down, one.up
    return config, tensors


_FREE = frozenset(
    [
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_dropout",
        "megatron_core",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "trainable_token_indices",
        "use_rslora",
    ]
)
"""Fields of PEFT's LoRA configuration that may hold anything: they change nothing here, are read below, or show among
the tensors."""

_INITIALIZATIONS = (None, True, False, "gaussian")
"""Those that leave the weights of the base model as they are; others change them when PEFT loads the adapter."""


def _is_plain(name: str, value: object) -> bool:
    """Whether a field lets an adapter be s B A alone; one that is not known does so if its value says nothing."""
    if name == "init_lora_weights":
        return value in _INITIALIZATIONS
    return name in _FREE or value in (None, False, [], {})


def read_adapter(folder: Path) -> dict[str, LowRank]:
    """Returns the changes in a folder that PEFT or a run of this package wrote, by parameter name.

    Args:
        folder: one with :data:`CONFIG`, or a checkpoint that has one as :data:`ADAPTER_FOLDER`.

    Raises:
        UserError: if there is no adapter, or one that does more than add s B A to matrices.
    """
    if not (folder / CONFIG).is_file():
        folder = folder / ADAPTER_FOLDER
    try:
        configuration, weights = _contents(folder)
        config, tensors = json.loads(configuration), load(weights)
        settings = AdapterSettings(
            float(config["lora_alpha"] if config["peft_type"] == "LORA" else math.nan),
            {str(name): float(alpha) for name, alpha in (config.get("alpha_pattern") or {}).items()},
            bool(config.get("use_rslora")),
        )
        for pattern in settings.alphas:
            re.compile(pattern)
    except FileNotFoundError as error:
        raise UserError(
            "there is no adapter in {folder}: no {name}", folder=folder, name=Path(error.filename or WEIGHTS).name
        ) from None
    except _UNREADABLE as error:
        raise UserError(
            "the adapter in {folder} cannot be read: {error!s:.400}; save it again", folder=folder, error=error
        ) from error
    downs = {
        name.removesuffix(".lora_A.weight"): one for name, one in tensors.items() if name.endswith(".lora_A.weight")
    }
    more = [name for name, value in config.items() if not _is_plain(name, value)]
    others = more + sorted(tensors.keys() - {f"{m}.lora_{side}.weight" for m in downs for side in "AB"})
    if math.isnan(settings.alpha) or others or not downs:
        found = others[0] if others else Translatable("another kind of adapter")
        raise UserError(
            "{folder} holds more than plain LoRA of matrices ({found}); merge it in Python with "
            "PeftModel.from_pretrained(...).merge_and_unload(), save the model and name that "
            "folder with --model",
            folder=folder,
            found=found,
        )
    changes = {}
    for module, down in downs.items():
        short = module.removeprefix(_PREFIX)
        (name,) = checkpoint_names({f"{short}.weight": down})
        up = tensors.get(f"{module}.lora_B.weight")
        if up is None or up.ndim != 2 or down.ndim != 2 or not up.shape[1] == len(down) > 0:
            raise UserError(
                "the adapter in {folder} is not whole: {module} has no A and B of one rank",
                folder=folder,
                module=module,
            )
        one = LowRank(down.float(), up.float(), settings.scale(short, len(down)))
        if not (math.isfinite(one.scale) and down.isfinite().all() and up.isfinite().all()):
            raise UserError(
                "the adapter in {folder} is damaged: {module} has numbers that are not finite",
                folder=folder,
                module=module,
            )
        changes[name] = one
    return changes


def _contents(folder: Path) -> tuple[bytes, bytes]:
    """Returns what :data:`CONFIG` and :data:`WEIGHTS` hold, compared with the manifest of a checkpoint around them."""
    names = (CONFIG, WEIGHTS)
    if folder.name == ADAPTER_FOLDER and (folder.parent / MANIFEST).is_file():
        entries = read_manifest(folder.parent)
        config, weights = (read_file(folder / name, entries[f"{folder.name}/{name}"]) for name in names)
        return config, weights
    for name, most in zip(names, (MAX_CONFIG_BYTES, MAX_WEIGHTS_BYTES), strict=True):
        if (folder / name).stat().st_size > most:
            raise ValueError(f"{name} has more than {most:,} bytes")
    return read_regular(folder / CONFIG), read_regular(folder / WEIGHTS)


def merged(weights: Mapping[str, Tensor], changes: Mapping[str, LowRank], folder: Path) -> dict[str, Tensor]:
    """Returns ``weights`` with the ``changes`` of the adapter in ``folder`` added.

    Raises:
        UserError: if the adapter is of a model of another shape.
    """
    result = dict(weights)
    for name, one in changes.items():
        if name not in weights or weights[name].shape != (len(one.up), one.down.shape[1]):
            raise UserError(
                "the adapter in {folder} is of another model: this one has no {name} of its shape",
                folder=folder,
                name=name,
            )
        result[name] = weights[name] + one.change()
    return result
