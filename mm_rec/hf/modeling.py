"""The model as `transformers` calls it: a causal language model with ``generate`` and ``save_pretrained``."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from mm_rec.config import FLOAT32_MATRICES, FLOAT32_VECTORS, ModelConfig
from mm_rec.hf.cache import MMRecCache
from mm_rec.hf.configuration import MMRecConfig
from mm_rec.hf.layers import LayeredPart, initialize_missing, is_plain, matrix_names, use_linear_layers
from mm_rec.inference import decode
from mm_rec.model import EMBEDDING_STD, MMRecModel
from mm_rec.storage.files import MANIFEST
from mm_rec.storage.hf_folder import MODELING_CODE, MODELING_FILE
from mm_rec.text.tokenizer import CONTROL_TOKENS

__all__ = ["MMRecBackbone", "MMRecForCausalLM"]


class MMRecBackbone(MMRecModel):
    """:class:`MMRecModel` without its output head, called as `transformers` calls a base model."""

    def __init__(self, config: MMRecConfig) -> None:
        super().__init__(config.model_config())
        use_linear_layers(self)
        self._defaults = config

    @property
    def dtype(self) -> torch.dtype:
        """Type of the activations: that of autocast where it is on. bfloat16 stands in for float16."""
        weight = self.embedding.weight
        kind = weight.device.type
        has_autocast = kind != "meta" and torch.is_autocast_enabled(kind)  # offloaded weights are on "meta"
        dtype = torch.get_autocast_dtype(kind) if has_autocast else weight.dtype
        return torch.bfloat16 if dtype == torch.float16 else dtype

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: MMRecCache | None = None,
        use_cache: bool | None = None,
        domain: str | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        """Returns features (B, T, D) of T more tokens of each row; arguments as in :meth:`MMRecForCausalLM.forward`.

        Arguments for attention kernels that collators add, such as ``cu_seq_lens_q``, are ignored.
        """
        if use_cache is None:
            use_cache = self._defaults.use_cache and not self.training
        cache = MMRecCache() if past_key_values is None else past_key_values
        if not isinstance(cache, MMRecCache):
            raise ValueError(f"past_key_values must be an MMRecCache, got {type(cache).__name__}")
        reset = _document_starts(input_ids, attention_mask, position_ids, cache.n_seen)
        features, state = self.features(input_ids, cache.state, self.chosen(domain), reset)
        if use_cache or past_key_values is not None:
            cache.update_state(state, input_ids.shape[1])
        features = features.to(self.embedding.weight.dtype)
        return BaseModelOutputWithPast(features, past_key_values=cache if use_cache else None)

    def reads_plainly(self) -> bool:
        """Whether the model is its weights and nothing else: no layer has an adapter, a hook or another class."""
        layers = (layer for part in self.layered_parts() for layer in part.children())
        return is_plain(self.embedding) and all(map(is_plain, layers))

    def layered_parts(self) -> list[LayeredPart]:
        """The blocks and the fusion."""
        return [module for module in self.modules() if isinstance(module, LayeredPart)]

    def chosen(self, domain: str | None) -> str | None:
        """Returns the expert to run, None for all, where ``domain`` is as in :meth:`MMRecForCausalLM.forward`."""
        domain = self._defaults.domain if domain is None else domain
        return None if domain == "all" else domain


class MMRecForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """:class:`MMRecModel` with the interface of a causal language model of `transformers`.

    What the configuration's ``domain`` does not run is frozen: with one expert, the others and the fusion.
    ``requires_grad_(True)`` thaws them for a ``domain`` that is named call by call.
    """

    config_class = MMRecConfig
    config: MMRecConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _is_stateful = True
    _tied_weights_keys = {"lm_head.weight": "model.embedding.weight"}  # noqa: RUF012
    _no_split_modules = ["MMRecLayeredBlock"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = [*FLOAT32_MATRICES, *FLOAT32_VECTORS]  # noqa: RUF012

    def __init__(self, config: MMRecConfig) -> None:
        super().__init__(config)
        self.model = MMRecBackbone(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()
        self._freeze_what_does_not_run()

    def _freeze_what_does_not_run(self) -> None:
        """Let only what the default domain runs be trained, so that no trained parameter goes without a gradient."""
        chosen = self.model.chosen(None)
        if chosen is not None:
            self.model.fusion.requires_grad_(False)
            for name, expert in self.model.experts.items():
                expert.requires_grad_(name == chosen)

    def initialize_weights(self) -> None:
        """Initialise what was not loaded."""
        for part in self.model.layered_parts():
            initialize_missing(part)
        super().initialize_weights()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=EMBEDDING_STD)

    def get_input_embeddings(self) -> nn.Module:
        """The embedding, whose weight is also that of the output head."""
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the embedding."""
        self.model.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        """The output head, whose weight is that of the embedding."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replace the output head."""
        self.lm_head = value

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # forward makes the cache

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: MMRecCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        domain: str | None = None,
        **loss_settings: Any,
    ) -> CausalLMOutputWithPast:
        """Reads T more tokens of each row.

        Args:
            input_ids: (B, T).
            attention_mask: (B, tokens seen before + T), 0 for padding, which stands at the left of a row. At the
                right it may stand where no more tokens follow. What padding holds changes no other token.
            position_ids: (B, T); a 0 starts a new document, as in packed rows. Other values are not looked at.
            past_key_values: what was read before.
            labels: (B, T), the tokens themselves, -100 where they don't count in the loss.
            use_cache: return the cache; the default is the configuration's, and no while training.
            logits_to_keep: how many of the last tokens to give logits for, 0 for all; or (n,) their places.
            domain: the expert to use, ``all`` to fuse them; None takes the configuration's.
            **loss_settings: for the loss, such as ``num_items_in_batch``.

        Raises:
            ValueError: for a mask of another length, padding between tokens, or an argument that is not supported:
                attention maps, hidden states of the layers, embeddings in place of tokens.
        """
        _refuse_unsupported(loss_settings)
        if input_ids is None:
            raise ValueError("MM-Rec reads tokens: give input_ids")
        if labels is None and past_key_values is not None:
            logits = self._step(input_ids, attention_mask, position_ids, past_key_values, domain)
            if logits is not None:
                cached = self.config.use_cache if use_cache is None else use_cache
                return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values if cached else None)
        base = self.model(input_ids, attention_mask, position_ids, past_key_values, use_cache, domain)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(base.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **loss_settings)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=base.past_key_values)

    def _step(
        self,
        tokens: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: MMRecCache,
        domain: str | None,
    ) -> Tensor | None:
        """Reads one more token of each row in one native call; returns logits (B, 1, V), None where that cannot be."""
        if tokens.shape[1] != 1 or not isinstance(cache, MMRecCache) or cache.state is None:
            return None
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        weight = self.model.embedding.weight
        tied = getattr(self.lm_head, "weight", None) is weight and is_plain(self.lm_head)
        if not tied or not self.model.reads_plainly():
            return None
        starts = _document_starts(tokens, attention_mask, position_ids, cache.n_seen)
        domain = self.model.chosen(domain)
        if starts is not None or decode.find_decoder(self.model, domain) is None:
            return None
        logits, state = decode.step(self.model, tokens[:, 0], cache.state, domain)
        cache.update_state(state, 1)
        return logits[:, None].to(weight.dtype)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **settings: Any) -> MMRecForCausalLM:
        """Loads a folder as the base class does, under the names of checkpoints too."""
        settings.setdefault("key_mapping", {rf"\.{name}$": f".{name}.weight" for name in _matrix_names()})
        found = super().from_pretrained(pretrained_model_name_or_path, *args, **settings)
        model: MMRecForCausalLM = found[0] if isinstance(found, tuple) else found  # with output_loading_info
        model._freeze_what_does_not_run()
        generation = model.generation_config
        if generation.suppress_tokens is None and isinstance(generation.eos_token_id, list):  # of an earlier version
            generation.suppress_tokens = [i for i in range(len(CONTROL_TOKENS)) if i not in generation.eos_token_id]
        return found  # type: ignore[no-any-return]

    def save_pretrained(self, save_directory: str | os.PathLike[str], **settings: Any) -> None:
        """Write configuration, weights and the modeling file for ``trust_remote_code``."""
        settings.setdefault("save_original_format", False)  # names of modules, as Trainer reads them
        super().save_pretrained(save_directory, **settings)
        Path(save_directory, MANIFEST).unlink(missing_ok=True)  # of an exported folder that is now another one
        Path(save_directory, MODELING_FILE).write_text(MODELING_CODE, encoding="utf-8", newline="\n")

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModelForCausalLM") -> None:
        """Does nothing: a saved folder has its own small modeling file and needs no copy of this module."""


@functools.cache
def _matrix_names() -> list[str]:
    """The names by which checkpoints know the matrices that are layers here."""
    with torch.device("meta"):
        return matrix_names(MMRecModel(ModelConfig.preset("tiny")))


def _refuse_unsupported(settings: dict[str, Any]) -> None:
    """Raises ValueError for arguments of other models that would be ignored in silence."""
    for name in ("inputs_embeds", "output_attentions", "output_hidden_states"):
        value = settings.get(name)
        if value is not None and value is not False:
            raise ValueError(f"MM-Rec does not support {name}")


def _document_starts(
    tokens: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, n_seen: int
) -> Tensor | None:
    """Returns (B, T) bool, True where a document starts; None if that is nowhere but before the first token.

    This is all that padding at the left of a row needs: the row starts afresh at its first real token.
    """
    if attention_mask is None and position_ids is None:
        return None
    starts = torch.zeros(tokens.shape, dtype=torch.bool, device=tokens.device)
    if attention_mask is not None:
        if attention_mask.shape != (tokens.shape[0], n_seen + tokens.shape[1]):
            raise ValueError(
                f"attention_mask is {tuple(attention_mask.shape)}, but it must cover the {n_seen} tokens read before "
                f"and the {tokens.shape[1]} of this call, for {tokens.shape[0]} rows"
            )
        real = attention_mask.bool()
        count = real.cumsum(dim=1)
        gap = ~real & (count > 0)
        if bool((real & (gap.cumsum(dim=1) > 0)).any()):
            raise ValueError("attention_mask has padding between tokens; pad at the left (padding_side='left')")
        starts |= (real & (count == 1))[:, n_seen:]
    if position_ids is not None:
        starts |= position_ids == 0
    return starts if bool(starts[:, 1:].any()) or (n_seen and bool(starts.any())) else None


AutoModelForCausalLM.register(MMRecConfig, MMRecForCausalLM, exist_ok=True)
