"""The shape of a model as a configuration of `transformers`."""

from __future__ import annotations

import os
import sys
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from mm_rec.config import DEFAULT_PRESET, ModelConfig
from mm_rec.formats import FIRST_VERSION, KEY, VERSIONS, check_version
from mm_rec.storage.hf_folder import AUTO_MAP

__all__ = ["MMRecConfig"]

ADAPTED_BY_DEFAULT = ("in_proj", "qkv_proj")
"""The layers that PEFT's LoRA adapts if it is told none: those that read a block's input, as in other models."""


class MMRecConfig(PreTrainedConfig):  # type: ignore[misc]
    """A :class:`ModelConfig` as a configuration of `transformers`, and the default ``domain``.

    ``domain`` is an expert, or ``all`` or None for all fused. What is not given is as in the default preset.
    """

    model_type = "mm_rec"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (the base class's form)
    attribute_map = {  # noqa: RUF012
        "hidden_size": "d_model",
        "intermediate_size": "d_ff",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
    }

    def __init__(self, domain: str | None = None, use_cache: bool = True, **settings: Any) -> None:
        for name, default in ModelConfig.preset(DEFAULT_PRESET).to_dict().items():
            setattr(self, name, settings.pop(name, default))
        self.domain = domain
        self.use_cache = use_cache
        super().__init__(**{**settings, KEY: VERSIONS["model"], "tie_word_embeddings": True})
        self.auto_map = dict(AUTO_MAP)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> MMRecConfig:
        """Reads a configuration as the base class does; an error of :meth:`from_dict` then says the name."""
        named = {"name_or_path": str(pretrained_model_name_or_path), **kwargs}
        found: MMRecConfig = super().from_pretrained(pretrained_model_name_or_path, **named)
        return found

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> MMRecConfig:
        """Makes a configuration of the values in ``config.json``; a FormatError if they are of another version."""
        where = kwargs.get("name_or_path") or "config.json"
        check_version("model", config_dict.get(KEY, FIRST_VERSION), where)
        found: MMRecConfig = super().from_dict(config_dict, **kwargs)
        return found

    def to_dict(self) -> dict[str, Any]:
        """As in the base class. PEFT asks for the model's type in it just before it looks up its default layers."""
        constants = sys.modules.get("peft.utils.constants")
        if constants is not None:
            mapping = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
            mapping.setdefault(self.model_type, list(ADAPTED_BY_DEFAULT))
        values: dict[str, Any] = super().to_dict()
        return values

    def model_config(self) -> ModelConfig:
        """The shape of the model; raises ValueError if there is no such model."""
        names = ModelConfig.preset(DEFAULT_PRESET).to_dict()
        return ModelConfig.from_dict({name: getattr(self, name) for name in names})

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Does nothing: a saved folder has its own small modeling file and needs no copy of this module."""


AutoConfig.register("mm_rec", MMRecConfig, exist_ok=True)
