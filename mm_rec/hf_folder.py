"""What makes a folder of weights loadable by `transformers`: its ``config.json`` and the small modeling file.

This module doesn't import `transformers`, so that checkpoints are written where it is not installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mm_rec.config import ModelConfig
from mm_rec.tokenizer import Tokenizer

__all__ = ["AUTO_MAP", "MODELING_CODE", "MODELING_FILE", "config_json", "default_domain", "generation_config_json"]

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


def config_json(config: ModelConfig, tokenizer: Tokenizer, domain: str | None) -> dict[str, Any]:
    """The content of ``config.json``.

    Args:
        config: shape of the model.
        tokenizer: that of the model.
        domain: the expert that answers unless the caller names another; None fuses all.
    """
    return {
        "model_type": "mm_rec",
        "architectures": ["MMRecForCausalLM"],
        "auto_map": AUTO_MAP,
        "dtype": "float32",
        "domain": domain,
        **_special_ids(tokenizer),
        **config.to_dict(),
    }


def generation_config_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of ``generation_config.json``: a text ends at EOS, an answer in a conversation at its end token."""
    return _special_ids(tokenizer) | {"eos_token_id": [tokenizer.eos_id, tokenizer.end_id]}


def default_domain(config: ModelConfig, weights: Mapping[str, Tensor]) -> str | None:
    """Who answers if nobody says: all experts fused (None) once the fusion is trained, until then the first expert.

    W_f of the fusion starts at zero, so that any other value tells that it was trained.
    """
    gate = weights.get("fusion.gate")
    return config.experts[0] if gate is not None and not gate.any() else None


def _special_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }
