"""The shape of a model: one frozen dataclass, three presets."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from mm_rec.errors import UserError
from mm_rec.translation import Translatable

__all__ = [
    "DEFAULT_PRESET",
    "DOMAINS",
    "FLOAT32_MATRICES",
    "FLOAT32_VECTORS",
    "KEY_TAPS",
    "PRESETS",
    "WEIGHTS",
    "ModelConfig",
    "check_expert_name",
]

FLOAT32_MATRICES = ("w_g", "key_taps")
"""Matrices of a block that act on float32 states and stay float32 whatever the precision."""

FLOAT32_VECTORS = ("decay_bias", "gate_bias", "score_bias")
"""Vectors of a block, which stay float32 whatever the precision, as all vectors do."""

WEIGHTS = ("full", "int8")
"""How the matrices of a trained model are loaded: as they are, or rounded to int8."""


MAX_SIZE = 2**31
"""Of any dimension."""

MAX_BASE = 1e12

KEY_TAPS = 4
"""Tokens whose own keys make a key: one and those before it, which the window has to hold."""

MAX_MEMORY = 2**20
"""Of the window and the pairs that are kept, by which no weight is bounded."""

MAX_BLOCKS = 2000
"""Of all experts together."""

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_NAMES = Translatable("names of 1 to 64 letters, digits, - and _")
_TAKEN = ("all", "fused", "mixed", "auto")
"""Names that stand for all experts, or for none."""

DOMAINS = ("text", "code")
"""Kinds of text, each of which has an expert and a data folder of its name."""


def check_expert_name(name: str) -> None:
    """Raise UserError if an expert of a new model can't have that name.

    PyTorch keeps the experts as attributes of a module, so that names of its own are taken.
    """
    from torch.nn import ModuleDict  # not at the top, so that --help is quick

    if not _NAME.fullmatch(name) or name in _TAKEN or hasattr(ModuleDict, name) or hasattr(ModuleDict(), name):
        raise UserError("a domain can't have the name {name!r:.80}; take another of {names}", name=name, names=_NAMES)


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of an MM-Rec model (letters as in :mod:`mm_rec.ops.reference`).

    Attributes:
        vocab_size: V, rows of the embedding; a tokenizer may use fewer ids.
        d_model: D, width of the residual stream.
        n_heads: H, divides D; the head size d = D / H is even.
        n_layers: L, blocks per expert.
        d_ff: F, hidden width of the feed-forward part.
        experts: names of the experts, which are also the names of the domains.
        gate_every: every how many blocks one is a memory block (recurrent gate and attention).
        window: W, tokens of short-term memory.
        kept_pairs: K, pairs of a key and a value that a head of a memory block keeps of the tokens before.
        rotary_base: base of the rotary encoding inside the window.
    """

    vocab_size: int
    d_model: int
    n_heads: int
    n_layers: int
    d_ff: int
    experts: tuple[str, ...] = DOMAINS
    gate_every: int = 3
    window: int = 128
    kept_pairs: int = 120
    rotary_base: float = 1000.0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "n_heads", "n_layers", "d_ff", "gate_every", "window", "kept_pairs"):
            value, most = getattr(self, name), MAX_MEMORY if name in ("window", "kept_pairs") else MAX_SIZE
            if type(value) is not int or not 1 <= value < most:
                raise ValueError(
                    Translatable(
                        "{name} must be a whole number of at least 1 and below {most:,}, got {value!r:.40}",
                        name=name,
                        most=most,
                        value=value,
                    )
                )
        base = self.rotary_base
        if isinstance(base, bool) or not isinstance(base, int | float) or not 0 < base <= MAX_BASE:
            raise ValueError(
                Translatable(
                    "rotary_base must be a number above 0 and at most {max_base:g}, got {base!r:.40}",
                    max_base=MAX_BASE,
                    base=base,
                )
            )
        if self.d_model % self.n_heads or (self.d_model // self.n_heads) % 2:
            raise ValueError(
                Translatable(
                    "d_model {d_model} does not split into {n_heads} heads of even size",
                    d_model=self.d_model,
                    n_heads=self.n_heads,
                )
            )
        if self.window < KEY_TAPS - 1:
            raise ValueError(
                Translatable(
                    "window must be at least {key_taps}, got {window}", key_taps=KEY_TAPS - 1, window=self.window
                )
            )
        names = self.experts
        if not isinstance(names, tuple) or not all(isinstance(name, str) and _NAME.fullmatch(name) for name in names):
            raise ValueError(Translatable("experts must be {allowed}, got {names!r:.80}", allowed=_NAMES, names=names))
        if len(names) * self.n_layers > MAX_BLOCKS:
            raise ValueError(
                Translatable(
                    "a model has at most {max_blocks:,} blocks, got {count} experts of {n_layers}",
                    max_blocks=MAX_BLOCKS,
                    count=len(names),
                    n_layers=self.n_layers,
                )
            )
        if not names or len(set(names)) != len(names):
            raise ValueError(
                Translatable("experts must be distinct names, at least one, got {names!r:.80}", names=names)
            )

    @property
    def head_dim(self) -> int:
        """d, the size of one head."""
        return self.d_model // self.n_heads

    def is_memory_block(self, index: int) -> bool:
        """Whether block ``index`` (from 0) carries W_g and attends: blocks 3, 6, 9, ... by default."""
        return (index + 1) % self.gate_every == 0

    @classmethod
    def preset(cls, name: str, **changes: Any) -> ModelConfig:
        """A named preset, with ``changes`` applied.

        >>> ModelConfig.preset("100m").d_model
        512
        >>> ModelConfig.preset("tiny", vocab_size=320).vocab_size
        320
        """
        if name not in PRESETS:
            raise ValueError(
                Translatable("unknown preset {name!r}; there are {presets}", name=name, presets=", ".join(PRESETS))
            )
        return dataclasses.replace(PRESETS[name], **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as written to a checkpoint's ``config.json``."""
        return {**dataclasses.asdict(self), "experts": list(self.experts)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """The inverse of :meth:`to_dict`; unknown keys are an error."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(Translatable("unknown model settings: {unknown}", unknown=", ".join(unknown)))
        experts = values.get("experts")
        return cls(**{**values, "experts": tuple(experts)} if isinstance(experts, list) else values)


PRESETS: dict[str, ModelConfig] = {
    "tiny": ModelConfig(vocab_size=512, d_model=64, n_heads=4, n_layers=3, d_ff=128),
    "small": ModelConfig(vocab_size=8192, d_model=256, n_heads=4, n_layers=6, d_ff=1024),
    "100m": ModelConfig(vocab_size=32000, d_model=512, n_heads=8, n_layers=11, d_ff=2048),
}

DEFAULT_PRESET = "100m"
