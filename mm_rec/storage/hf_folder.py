"""Writes the files that `transformers` needs beside ``model.safetensors``.

This module doesn't import `transformers`, so that checkpoints are written where it is not installed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from mm_rec.config import ModelConfig
from mm_rec.formats import KEY, VERSIONS
from mm_rec.text.tokenizer import Tokenizer

__all__ = ["AUTO_MAP", "MODELING_CODE", "MODELING_FILE", "default_domain", "write_model_files"]

MODELING_FILE = "modeling_mm_rec.py"

MODELING_CODE = '''\
"""MM-Rec for `transformers`, loaded with trust_remote_code=True. The model itself is in the package mm_rec."""

from mm_rec.hf import MMRecConfig, MMRecForCausalLM

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
    # A text ends at EOS, an answer in a conversation at its end token.
    generation = {**ids, "eos_token_id": [tokenizer.eos_id, tokenizer.end_id]}
    for name, values in (("config.json", model), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    (folder / MODELING_FILE).write_text(MODELING_CODE, encoding="utf-8")
    tokenizer.save(folder)


def default_domain(config: ModelConfig, weights: Mapping[str, Tensor]) -> str | None:
    """Returns the default domain: None (all experts fused) once the fusion is trained, until then the first expert.

    W_f of the fusion starts at zero, so any other value shows that it was trained.
    """
    gate = weights.get("fusion.gate")
    return config.experts[0] if gate is not None and not gate.any() else None
