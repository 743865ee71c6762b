"""The state of a model: everything it remembers between two calls, of a size that never grows.

The state is a plain nested structure of tensors (named tuples, lists, a dict), so that
``torch.utils._pytree``, safetensors and a human can all walk it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mm_rec.config import KEY_TAPS, ModelConfig

__all__ = [
    "BlockState",
    "MemoryState",
    "ModelState",
    "detach_state",
    "flatten_state",
    "initial_state",
    "map_state",
    "unflatten_state",
]


class MemoryState(NamedTuple):
    """What a memory block keeps (letters as in :mod:`mm_rec.ops.reference`).

    Attributes:
        k, v: (B, W, H, d), keys (un-rotated) and values of the last W tokens, oldest first, activation type. A key is
            made of the tokens' own keys, that of its token and of those before it.
        own: (B, J - 1, H, d), the own keys of the last tokens, of which the next key is made.
        score: (B, W, H) float32, the scores of the last W tokens, which decide whether they are kept.
        kept_k, kept_v: (B, H, K, d), the pairs that each head keeps of the tokens before, activation type.
        kept_score: (B, H, K) float32, their scores; -inf for a slot in which there is none.
    """

    k: Tensor
    v: Tensor
    own: Tensor
    score: Tensor
    kept_k: Tensor
    kept_v: Tensor
    kept_score: Tensor


class BlockState(NamedTuple):
    """State of one block: the recurrence h (B, D) float32, and the memories of a memory block."""

    h: Tensor
    memory: MemoryState | None


class ModelState(NamedTuple):
    """State of a model.

    Attributes:
        position: (B,) int64, how many tokens of its current document each row has seen.
        experts: for every expert that runs, the states of its blocks.
    """

    position: Tensor
    experts: dict[str, list[BlockState]]


def initial_state(
    config: ModelConfig,
    batch_size: int,
    experts: tuple[str, ...],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> ModelState:
    """The empty state before a document's first token; ``dtype`` is that of the activations."""
    heads, d, width = config.n_heads, config.head_dim, config.d_model
    kept = torch.promote_types(dtype, torch.float32)  # what lasts stays wide: bf16 turns a decay of 0.999 into 1

    def block(index: int) -> BlockState:
        h = torch.zeros(batch_size, width, dtype=kept, device=device)
        if not config.is_memory_block(index):
            return BlockState(h, None)
        ring = torch.zeros(batch_size, config.window, heads, d, dtype=dtype, device=device)
        own = torch.zeros(batch_size, KEY_TAPS - 1, heads, d, dtype=dtype, device=device)
        score = torch.zeros(batch_size, config.window, heads, dtype=kept, device=device)
        pairs = torch.zeros(batch_size, heads, config.kept_pairs, d, dtype=dtype, device=device)
        nothing = torch.full((batch_size, heads, config.kept_pairs), -math.inf, dtype=kept, device=device)
        return BlockState(h, MemoryState(ring, ring.clone(), own, score, pairs, pairs.clone(), nothing))

    position = torch.zeros(batch_size, dtype=torch.int64, device=device)
    return ModelState(position, {name: [block(i) for i in range(config.n_layers)] for name in experts})


def map_state(state: ModelState, function: Callable[[Tensor], Tensor]) -> ModelState:
    """``state`` with ``function`` applied to every tensor, in the order of :func:`flatten_state`."""

    def block(one: BlockState) -> BlockState:
        h = function(one.h)
        return BlockState(h, None if one.memory is None else MemoryState(*(function(tensor) for tensor in one.memory)))

    position = function(state.position)
    return ModelState(position, {name: [block(one) for one in blocks] for name, blocks in state.experts.items()})


def detach_state(state: ModelState) -> ModelState:
    """``state`` cut off from the graph that made it, as it is carried from one training step to the next."""
    return map_state(state, Tensor.detach)


def flatten_state(state: ModelState) -> dict[str, Tensor]:
    """Names and tensors of a state, as safetensors wants them."""
    flat = {"position": state.position}
    for name, blocks in state.experts.items():
        for index, block in enumerate(blocks):
            prefix = f"experts.{name}.blocks.{index}."
            flat[prefix + "h"] = block.h
            if block.memory is not None:
                flat |= {f"{prefix}memory.{field}": value for field, value in block.memory._asdict().items()}
    return {name: tensor.contiguous() for name, tensor in flat.items()}


def unflatten_state(flat: dict[str, Tensor], config: ModelConfig) -> ModelState:
    """The inverse of :func:`flatten_state`.

    Raises:
        ValueError: if names or shapes don't fit ``config``.
    """
    experts = tuple(name for name in config.experts if f"experts.{name}.blocks.0.h" in flat)
    if "position" not in flat or not experts:
        raise ValueError("not a state of an MM-Rec model: no position or no expert in it")
    template = initial_state(config, flat["position"].shape[0], experts)
    expected = flatten_state(template)
    if expected.keys() != flat.keys():
        names = sorted(expected.keys() ^ flat.keys())
        raise ValueError(f"state does not fit the model: {names[0]} is missing or too many")
    for name, tensor in expected.items():
        if tensor.shape != flat[name].shape:
            raise ValueError(f"state does not fit the model: {name} is {tuple(flat[name].shape)}")
    values = iter(flat[name] for name in expected)  # in the order that map_state visits
    return map_state(template, lambda _: next(values))
