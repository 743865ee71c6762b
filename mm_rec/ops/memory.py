"""Writing and reading the memories; definitions in :mod:`mm_rec.ops.reference`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mm_rec.ops import reference
from mm_rec.ops.backend import fits, runs_native
from mm_rec.ops.checks import check_float, check_shape, check_type, one_type
from mm_rec.ops.registry import below_autograd, define, differentiable

__all__ = ["memory_read", "memory_update"]


def _versions(time: int, window: int) -> int:
    """Versions of the long-term memory that a chunk of ``time`` tokens needs: the one given and its writes."""
    return -(-time // (window // 2)) + 1


def _fake_update(
    k: Tensor,
    v: Tensor,
    address: Tensor,
    rate: Tensor,
    position: Tensor,
    key0: Tensor,
    value0: Tensor,
    mass0: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, time = position.shape
    versions = _versions(time, k.shape[1] - time)
    key = key0.new_empty((batch, versions, *key0.shape[1:]))
    return key, torch.empty_like(key), mass0.new_empty((batch, versions, *mass0.shape[1:]))


def _fake_update_backward(
    dkey: Tensor,
    dvalue: Tensor,
    dmass: Tensor,
    key: Tensor,
    value: Tensor,
    mass: Tensor,
    k: Tensor,
    v: Tensor,
    address: Tensor,
    rate: Tensor,
    position: Tensor,
) -> tuple[Tensor, ...]:
    like = (k, v, address, rate, key[:, 0], value[:, 0], mass[:, 0])
    return tuple(x.new_empty(x.shape) for x in like)


def _fake_read(
    q: Tensor, k: Tensor, v: Tensor, key: Tensor, value: Tensor, mass: Tensor, position: Tensor, rotary_base: float
) -> tuple[Tensor, Tensor]:
    batch, time, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, time), dtype=torch.float32)


def _fake_read_backward(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key: Tensor,
    value: Tensor,
    mass: Tensor,
    position: Tensor,
    rotary_base: float,
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (q, k, v, key, value, mass))


_update = define(
    "memory_update(Tensor k, Tensor v, Tensor address, Tensor rate, Tensor position, Tensor key0, Tensor value0, "
    "Tensor mass0) -> (Tensor, Tensor, Tensor)",
    _fake_update,
)
_update_backward = define(
    "memory_update_backward(Tensor dkey, Tensor dvalue, Tensor dmass, Tensor key, Tensor value, Tensor mass, "
    "Tensor k, Tensor v, Tensor address, Tensor rate, Tensor position) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    # dk, dv, daddress, drate, dkey0, dvalue0, dmass0
    _fake_update_backward,
)
_read = define(
    "memory_read(Tensor q, Tensor k, Tensor v, Tensor key, Tensor value, Tensor mass, Tensor position, "
    "float rotary_base) -> (Tensor, Tensor)",
    # the result and, for the backward pass, the log of the softmax's denominator (B, H, T) in float32
    _fake_read,
)
_read_backward = define(
    "memory_read_backward(Tensor dout, Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v, Tensor key, "
    "Tensor value, Tensor mass, Tensor position, float rotary_base) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",  # dq, dk, dv, dkey, dvalue, dmass
    _fake_read_backward,
)


class _Update(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        k: Tensor,
        v: Tensor,
        address: Tensor,
        rate: Tensor,
        position: Tensor,
        key0: Tensor,
        value0: Tensor,
        mass0: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        with below_autograd():
            key, value, mass = _update(k, v, address, rate, position, key0, value0, mass0)
        ctx.save_for_backward(key, value, mass, k, v, address, rate, position)
        return key, value, mass

    @staticmethod
    def backward(ctx: Any, dkey: Tensor, dvalue: Tensor, dmass: Tensor) -> tuple[Tensor | None, ...]:
        dk, dv, daddress, drate, *dmemory = _update_backward(dkey, dvalue, dmass, *ctx.saved_tensors)
        return dk, dv, daddress, drate, None, *dmemory


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key: Tensor,
        value: Tensor,
        mass: Tensor,
        position: Tensor,
        rotary_base: float,
    ) -> tuple[Tensor, Tensor]:
        with below_autograd():
            out, lse = _read(q, k, v, key, value, mass, position, rotary_base)
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(out, lse, q, k, v, key, value, mass, position)
        ctx.rotary_base = rotary_base
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if dout is None:
            return (None,) * 8
        return *_read_backward(dout, *ctx.saved_tensors, ctx.rotary_base), None, None


differentiable(_update, _Update)
differentiable(_read, _Read)


def _check_context(k: Tensor, v: Tensor, position: Tensor) -> int:
    """Check the ring and chunk and return the window W."""
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

    A token whose position in its document is a multiple of P = W / 2, and at least W, writes the P tokens in
    the older half of the ring before it is read itself. Token t goes to slot s with weight
    w_t[s] = rate * softmax_s(k_t . address_s), and with a = prod_t (1 - w_t[s]):

    M[s] <- a M[s] + sum_t w_t[s] (k_t, v_t);  mass[s] <- a mass[s] + sum_t w_t[s]

    The first write of a document (position W) starts from an empty memory.

    Args:
        k, v: (B, W + T, H, d), un-rotated: the ring of the last W tokens, oldest first, then the chunk.
        address: (H, S, d), learned.
        rate: (H,) in (0, 1), learned.
        position: (B, T) int64, position of each token of the chunk in its document.
        key0, value0: (B, H, S, d), mass0: (B, H, S): the memory before the chunk.

    Returns:
        key, value: (B, E + 1, H, S, d) and mass: (B, E + 1, H, S), float32, with E = ceil(T / P): version 0
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

    A token sees the last W tokens of its own document, itself included, under rotary encoding, and the
    slots as they are after the writes up to its position: key rms_norm(M_k), value M_v / mass, logit
    q . key / sqrt(d) + log mass. Slots of mass 0 are masked, and so are all slots before position W.

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
    versions, slots = _versions(time, window), key.shape[3]
    check_shape("key", key, (batch, versions, heads, slots, head_dim), k)
    check_shape("value", value, (batch, versions, heads, slots, head_dim), k)
    check_shape("mass", mass, (batch, versions, heads, slots), k)
    if not runs_native("memory_read", q, k, v, key, value, mass) or not fits("memory_read", k, head_dim, slots):
        return reference.memory_read(q, k, v, key, value, mass, position, rotary_base)
    out_dtype = q.dtype
    q_, k_, v_ = one_type(q, k, v)
    out, _ = _read(q_, k_, v_, key.float(), value.float(), mass.float(), position, rotary_base)
    return out.to(out_dtype)  # type: ignore[no-any-return]
