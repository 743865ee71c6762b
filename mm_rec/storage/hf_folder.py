"""The files that `transformers` needs beside ``model.safetensors``, and folders that it saved itself.

A matrix is a linear layer in `transformers`, so that other tools find it: what a checkpoint names
``experts.text.blocks.0.in_proj`` is ``model.experts.text.blocks.0.in_proj.weight`` there, the name of the module.

This module doesn't import `transformers`, so that checkpoints are written where it is not installed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from mm_rec.config import FLOAT32_MATRICES, ModelConfig
from mm_rec.errors import UserError
from mm_rec.formats import KEY, VERSIONS
from mm_rec.regular_file import read_regular
from mm_rec.storage.files import MANIFEST
from mm_rec.text.tokenizer import Tokenizer

__all__ = [
    "AUTO_MAP",
    "CONFIG",
    "INDEX",
    "MODELING_CODE",
    "MODELING_FILE",
    "TOKENIZER",
    "WEIGHTS",
    "checkpoint_names",
    "default_domain",
    "is_complete",
    "is_layer",
    "is_saved_by_transformers",
    "module_names",
    "read_saved_weights",
    "write_model_files",
]

CONFIG, TOKENIZER, WEIGHTS = "config.json", "tokenizer.json", "model.safetensors"
INDEX = "model.safetensors.index.json"
"""Names the file of each weight where they are in several."""
EMBEDDING, HEAD = "embedding.weight", "lm_head.weight"

MODELING_FILE = "modeling_mm_rec.py"

MODELING_CODE = '''\
"""MM-Rec for `transformers`, loaded with trust_remote_code=True. The model itself is in the package mm_rec."""

try:
    from mm_rec.hf import MMRecConfig, MMRecForCausalLM
except ModuleNotFoundError as error:
    if error.name != "mm_rec":
        raise
    raise ImportError(
        "this model runs by the package mm_rec, which is not installed here: get the sources of MM-Rec from where the "
        "model comes from, and `pip install './mm-rec[hf]'` in the folder that holds them (or `make setup` inside)"
    ) from None

__all__ = ["MMRecConfig", "MMRecForCausalLM"]
'''

AUTO_MAP = {
    "AutoConfig": "modeling_mm_rec.MMRecConfig",
    "AutoModelForCausalLM": "modeling_mm_rec.MMRecForCausalLM",
}


def write_model_files(folder: Path, config: ModelConfig, tokenizer: Tokenizer, domain: str | None) -> None:
    """Writes ``config.json``, ``generation_config.json``, the modeling file and the tokenizer's files.

    Args:
        folder: the folder of ``model.safetensors``.
        config: shape of the model.
        tokenizer: the model's tokenizer.
        domain: the default domain, an expert; None fuses all.
    """
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    model = {
        KEY: VERSIONS["model"],
        "model_type": "mm_rec",
        "architectures": ["MMRecForCausalLM"],
        "auto_map": AUTO_MAP,
        "dtype": "float32",
        "domain": domain,
        **ids,
        **config.to_dict(),
    }
    # A text ends at EOS, an answer in a conversation at its end token; other control tokens are never drawn.
    ends = [tokenizer.eos_id, tokenizer.end_id]
    never_drawn = [token for token in tokenizer.control_ids.values() if token not in ends]
    generation = {**ids, "eos_token_id": ends, "suppress_tokens": never_drawn}
    for name, values in (("config.json", model), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8", newline="\n")
    (folder / MODELING_FILE).write_text(MODELING_CODE, encoding="utf-8", newline="\n")
    tokenizer.save(folder)


def default_domain(config: ModelConfig, weights: Mapping[str, Tensor]) -> str | None:
    """Returns the default domain: None (all experts fused) once the fusion is trained, until then the first expert.

    W_f of the fusion starts at zero, so any other value shows that it was trained.
    """
    gate = weights.get("fusion.gate")
    return config.experts[0] if gate is not None and not gate.any() else None


def is_layer(name: str, parameter: Tensor) -> bool:
    """Whether the parameter ``name`` of a checkpoint is the weight of a linear layer in `transformers`."""
    return parameter.ndim == 2 and name != EMBEDDING and name.rpartition(".")[2] not in FLOAT32_MATRICES


def module_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the weights of a checkpoint under the names of the modules in `transformers`."""
    return {f"model.{name}.weight" if is_layer(name, x) else f"model.{name}": x for name, x in weights.items()}


def checkpoint_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns weights that `transformers` saved under the names of a checkpoint, which stay as they are."""
    found = {}
    for name, tensor in weights.items():
        short = name.removeprefix("model.")
        found[short if short in (EMBEDDING, HEAD) else short.removesuffix(".weight")] = tensor
    return found


def is_saved_by_transformers(folder: Path) -> bool:
    """Whether a folder holds a model that `transformers` or a tool around it saved: weights without a manifest."""
    has_weights = (folder / WEIGHTS).is_file() or (folder / INDEX).is_file()
    return has_weights and (folder / CONFIG).is_file() and not (folder / MANIFEST).exists()


def is_complete(folder: Path) -> bool:
    """Whether a folder that was fetched from a hub has all files that :func:`read_saved_weights` and others need."""
    try:
        names = [CONFIG, TOKENIZER, *_weight_files(folder)]
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False
    return all((folder / name).is_file() for name in names)


def _weight_files(folder: Path) -> list[str]:
    """The names of the files that hold the weights, which lie in ``folder`` itself.

    Raises:
        OSError: if the index cannot be read.
        ValueError: if it names a file elsewhere; this and KeyError, AttributeError, TypeError if it is no index.
    """
    index = folder / INDEX
    if not index.exists():
        return [WEIGHTS]
    names = sorted(set(json.loads(read_regular(index))["weight_map"].values()))
    for name in names:
        if Path(name).name != name or name in ("", ".", ".."):
            raise ValueError(f"{INDEX} names a file outside of the folder, {name!r:.80}")
    return names


def read_saved_weights(folder: Path) -> tuple[dict[str, Tensor], str]:
    """Returns the weights in a folder of :func:`is_saved_by_transformers`, and the SHA-256 of the bytes read.

    The weights are float32, under the names of a checkpoint; later changes of the files don't reach them.

    Raises:
        UserError: if a file is missing or no safetensors file, or the output head is not the embedding.
    """
    try:
        contents = [read_regular(folder / file) for file in _weight_files(folder)]
        saved = {name: tensor for content in contents for name, tensor in load(content).items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError, SafetensorError) as error:
        raise UserError(
            "the weights in {folder} cannot be read: {error}; save the model again", folder=folder, error=error
        ) from error
    weights = {name: tensor.to(torch.float32) for name, tensor in checkpoint_names(saved).items()}
    head = weights.pop(HEAD, None)
    if head is not None and not torch.equal(head, weights.get(EMBEDDING, head[:0])):
        raise UserError(
            "the output head in {folder} is not the embedding, as it always is in MM-Rec; train "
            "without either among modules_to_save (trainable_token_indices of PEFT trains rows "
            "of both)",
            folder=folder,
        )
    digest = hashlib.sha256()
    for content in contents:
        digest.update(content)
    return weights, digest.hexdigest()
