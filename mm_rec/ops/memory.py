"""Writing and reading the memories; formulas in :mod:`mm_rec.ops.reference`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mm_rec.ops import reference
from mm_rec.ops.backend import fits, runs_native
from mm_rec.ops.checks import check_float, check_shape, check_type, one_type
from mm_rec.ops.registry import below_autograd, define, differentiable

__all__ = ["memory_read", "memory_update"]


def _like_update(args: Any) -> tuple[Tensor, ...]:
    time = args.position.shape[1]
    versions = reference.memory_versions(time, args.k.shape[1] - time)
    before = (args.key0, args.value0, args.mass0)
    return tuple(x[:, None].expand(-1, versions, *x.shape[1:]) for x in before)


_WRITTEN = "Tensor k, Tensor v, Tensor address, Tensor rate, Tensor position"
_MEMORY = "Tensor key, Tensor value, Tensor mass"
_READ = f"Tensor q, Tensor k, Tensor v, {_MEMORY}, Tensor position, float rotary_base"
_update = define(
    f"memory_update({_WRITTEN}, Tensor key0, Tensor value0, Tensor mass0) -> (Tensor, Tensor, Tensor)", _like_update
)
_update_backward = define(
    f"memory_update_backward(Tensor dkey, Tensor dvalue, Tensor dmass, {_MEMORY}, {_WRITTEN})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    # dk, dv, daddress, drate, dkey0, dvalue0, dmass0
    lambda args: (
        *(args.k, args.v, args.address, args.rate),
        *(memory[:, 0] for memory in (args.key, args.value, args.mass)),
    ),
)
_read = define(
    f"memory_read({_READ}) -> (Tensor, Tensor)",
    # the result and, for the backward pass, the log of the softmax's denominator (B, H, T) in float32
    lambda args: (args.q, args.q[..., 0].transpose(1, 2).float()),
)
_read_backward = define(
    f"memory_read_backward(Tensor dout, Tensor out, Tensor lse, {_READ})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda args: (args.q, args.k, args.v, args.key, args.value, args.mass),  # their gradients
)


class _Update(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        with below_autograd():
            memory: tuple[Tensor, ...] = _update(*inputs)
        ctx.save_for_backward(*memory, *inputs[:5])  # all but the memory before, on which no gradient depends
        return memory

    @staticmethod
    def backward(ctx: Any, dkey: Tensor, dvalue: Tensor, dmass: Tensor) -> tuple[Tensor | None, ...]:
        dk, dv, daddress, drate, *dmemory = _update_backward(dkey, dvalue, dmass, *ctx.saved_tensors)
        return dk, dv, daddress, drate, None, *dmemory


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        with below_autograd():
            out, lse = _read(*inputs)
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(out, lse, *inputs[:-1])
        ctx.rotary_base = inputs[-1]
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if dout is None:
            return (None,) * 8
        return *_read_backward(dout, *ctx.saved_tensors, ctx.rotary_base), None, None


differentiable(_update, _Update)
differentiable(_read, _Read)


def _check_context(k: Tensor, v: Tensor, position: Tensor) -> int:
    """Check the ring and the chunk, and return the window W."""
    check_float("k", k, 4)
    check_shape("v", v, k.shape, k)
    if position.dim() != 2 or position.shape[0] != k.shape[0] or not position.shape[1]:
        raise ValueError(f"position must be ({k.shape[0]}, T), got {tuple(position.shape)}")
    check_type("position", position, position.shape, torch.int64, k)
    window = k.shape[1] - position.shape[1]
    if window < 2 or window % 2:
        raise ValueError(f"k must hold an even window of tokens before the chunk of position, got {window}")
    return window


def memory_update(
    k: Tensor,
    v: Tensor,
    address: Tensor,
    rate: Tensor,
    position: Tensor,
    key0: Tensor,
    value0: Tensor,
    mass0: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """All writes to the long-term memory that a chunk of T tokens causes.

    Defined by :func:`mm_rec.ops.reference.memory_update`.

    Args:
        k, v: (B, W + T, H, d), un-rotated: the ring of the last W tokens, oldest first, then the chunk.
        address: (H, S, d), learned.
        rate: (H,) in (0, 1), learned.
        position: (B, T) int64, position of each token of the chunk in its document.
        key0, value0: (B, H, S, d), mass0: (B, H, S): the memory before the chunk.

    Returns:
        key, value: (B, E + 1, H, S, d) and mass: (B, E + 1, H, S), float32, with E = ceil(T / P), P = W / 2: version 0
        is the memory given, version e the one after the e-th write of that row. Versions past a row's last
        write repeat it.

    Raises:
        TypeError, ValueError: an argument has the wrong type or shape; the message names it.
    """
    _check_context(k, v, position)
    batch, _, heads, head_dim = k.shape
    check_float("address", address, 3)
    slots = address.shape[1]
    check_shape("address", address, (heads, slots, head_dim), k)
    check_shape("rate", rate, (heads,), k)
    check_shape("key0", key0, (batch, heads, slots, head_dim), k)
    check_shape("value0", value0, (batch, heads, slots, head_dim), k)
    check_shape("mass0", mass0, (batch, heads, slots), k)
    native = runs_native("memory_update", k, v, address, rate, key0, value0, mass0)
    if not native or not fits("memory_update", k, head_dim, slots):
        return reference.memory_update(k, v, address, rate, position, key0, value0, mass0)
    k_, v_ = one_type(k, v)
    memory: tuple[Tensor, Tensor, Tensor] = _update(
        k_, v_, address.float(), rate.float(), position, key0.float(), value0.float(), mass0.float()
    )
    return memory


def memory_read(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key: Tensor,
    value: Tensor,
    mass: Tensor,
    position: Tensor,
    rotary_base: float = 1000.0,
) -> Tensor:
    """One softmax over the window of recent tokens and the slots of the long-term memory.

    Defined by :func:`mm_rec.ops.reference.memory_read`.

    Args:
        q: (B, T, H, d), un-rotated.
        k, v: (B, W + T, H, d), un-rotated: ring, oldest first, then the chunk.
        key, value, mass: the versions that :func:`memory_update` returns.
        position: (B, T) int64.
        rotary_base: see :func:`rotate`.

    Returns:
        (B, T, H, d) in the type of ``q``.

    Raises:
        TypeError, ValueError: an argument has the wrong type or shape; the message names it.
    """
    window = _check_context(k, v, position)
    batch, time = position.shape
    heads, head_dim = k.shape[2:]
    check_float("q", q, 4)
    check_shape("q", q, (batch, time, heads, head_dim), k)
    if head_dim % 2:
        raise ValueError(f"q must have heads of even size, got {head_dim}")
    check_float("key", key, 5)
    versions, slots = reference.memory_versions(time, window), key.shape[3]
    check_shape("key", key, (batch, versions, heads, slots, head_dim), k)
    check_shape("value", value, (batch, versions, heads, slots, head_dim), k)
    check_shape("mass", mass, (batch, versions, heads, slots), k)
    if not runs_native("memory_read", q, k, v, key, value, mass) or not fits("memory_read", k, head_dim, slots):
        return reference.memory_read(q, k, v, key, value, mass, position, rotary_base)
    out_dtype = q.dtype
    q_, k_, v_ = one_type(q, k, v)
    out, _ = _read(q_, k_, v_, key.float(), value.float(), mass.float(), position, rotary_base)
    return out.to(out_dtype)  # type: ignore[no-any-return]
