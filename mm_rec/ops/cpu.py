"""The CPU back end: the kernels of ``mm_rec/cpp/src`` on PyTorch tensors.

Every function has the arguments of the op's schema. Inputs may be strided as long as rows are evenly spaced,
which slices of a wide product are; others are copied. Results are contiguous.
"""

from __future__ import annotations

import ctypes
import functools
import math
import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mm_rec.ops import matmul
from mm_rec.ops.backend import Native
from mm_rec.ops.native import CpuLibrary
from mm_rec.ops.optimizer import Update
from mm_rec.ops.reference import rotary_angles

__all__ = ["load"]

RAW = ("step", "step_scratch", "pack_layout", "pack", "sample", "sample_scratch")  # for mm_rec.ops.step and .sample
LOGIT_BYTES = 68_000_000  # most memory for the logits of a chunk of rows
_kept = threading.local()  # per thread: the buffer of the last logits; fresh pages for it cost as much as its softmax
_TYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}

_call: SimpleNamespace  # the functions of the library, set by load()


def load() -> Native:
    """Load the library and return its kernels, by op name.

    Raises:
        NativeUnavailableError: the library is missing or broken.
    """
    from mm_rec.ops import cpu_branches  # which needs this module

    global _call
    library = CpuLibrary()
    _call = library.call
    kernels: list[Callable[..., Any]] = [
        recurrence, recurrence_backward, scan, scan_backward, mdi, mdi_backward, rms_norm, rms_norm_backward,
        add_rms_norm, add_rms_norm_backward, readout, readout_backward, relu_squared, relu_squared_backward,
        memory_update, memory_update_backward, memory_read, memory_read_backward, linear_cross_entropy, adamw_,
        sum_of_squares, *cpu_branches.KERNELS,
    ]  # fmt: skip
    functions = {kernel.__name__: kernel for kernel in kernels}
    if library.level in ("avx512bf16", "amx"):
        matmul.use(_call.tile_product if library.level == "amx" else _call.vector_product)
        functions |= {"mm": matmul.mm, "linear": cpu_branches.linear}
    raw = {name: getattr(_call, name) for name in RAW}
    return Native(str(library.path), library.level, functions | raw)


def _empty(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory for a result, uninitialised: the kernel writes every element."""
    return torch.empty(shape, dtype=dtype)


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """A (B, T, D) tensor as B * T evenly spaced rows, and the distance between rows; a copy if need be."""
    batch, time, width = x.shape
    outer, inner, last = x.stride()
    if last == 1 or width == 1:
        if time == 1:
            return x, outer
        if batch == 1 or outer == time * inner:
            return x, inner
    return x.contiguous(), width


def _flat_rows(x: Tensor) -> tuple[Tensor, int]:
    """A (..., n) tensor as evenly spaced rows of n; a copy if need be."""
    if x.dim() == 3:
        return _rows(x)
    return x.contiguous(), x.shape[-1]


def _two_level_rows(x: Tensor) -> tuple[Tensor, int, int, int]:
    """A (..., n) tensor as rows of n: the tensor, rows per outer step, outer and inner distance."""
    if x.dim() == 4 and (x.stride(3) == 1 or x.shape[3] == 1):
        batch, time, inner, _ = x.shape
        if batch == 1 or x.stride(0) == time * x.stride(1):
            return x, inner, x.stride(1), x.stride(2)
    x, row = _flat_rows(x)
    return x, 1, row, 0


def _head_rows(x: Tensor) -> tuple[Tensor, int]:
    """A (B, T, H, d) tensor as B * T evenly spaced rows of H * d, and the distance between rows; a copy if need be."""
    batch, time, heads, head_dim = x.shape
    outer, row, head, last = x.stride()
    if last == 1 and (head == head_dim or heads == 1) and (batch == 1 or outer == time * row) and time > 1:
        return x, row
    return x.contiguous(), heads * head_dim


def _check(result: int) -> None:
    """Raise for a kernel that did not run: 1 means no memory for its scratch, 2 positions that cannot be."""
    if result == 1:
        raise MemoryError("no memory for the scratch of a kernel")
    if result == 2:
        raise ValueError("position must not be negative nor cause more than one write in every W / 2 tokens")


def scan(a: Tensor, x: Tensor, s0: Tensor | None, reset: Tensor | None) -> Tensor:
    batch, time, width = x.shape
    (a, a_row), (x, x_row), s0, reset = _rows(a), _rows(x), _contiguous(s0), _contiguous(reset)
    s = _empty(x.shape)
    _call.scan_forward(
        batch, time, width, a.data_ptr(), a_row, x.data_ptr(), x_row, _pointer(s0), _pointer(reset), s.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return s


def scan_backward(
    ds: Tensor, s: Tensor, a: Tensor, s0: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    batch, time, width = s.shape
    (ds, ds_row), (a, a_row), s = _rows(ds), _rows(a), s.contiguous()
    s0, reset = _contiguous(s0), _contiguous(reset)
    da, dx, ds0 = _empty(s.shape), _empty(s.shape), _empty((batch, width))
    _call.scan_backward(
        batch, time, width, ds.data_ptr(), ds_row, s.data_ptr(), a.data_ptr(), a_row, _pointer(s0), _pointer(reset),
        da.data_ptr(), dx.data_ptr(), ds0.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return da, dx, ds0


def recurrence(
    z: Tensor, u: Tensor, gamma: Tensor, w_g: Tensor, h0: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    batch, time, width = z.shape
    heads, head_dim, _ = w_g.shape
    (z, z_row), (u, u_row), (gamma, gamma_row) = _rows(z), _rows(u), _rows(gamma)
    w_g, h0, reset = w_g.contiguous(), _contiguous(h0), _contiguous(reset)
    h, h_last = _empty(z.shape), _empty((batch, width))
    result = _call.recurrence_forward(
        _TYPE_CODES[u.dtype], batch, time, heads, head_dim, z.data_ptr(), z_row, u.data_ptr(), u_row,
        gamma.data_ptr(), gamma_row, w_g.data_ptr(), _pointer(h0), _pointer(reset), h.data_ptr(), h_last.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    _check(result)
    return h, h_last


def recurrence_backward(
    dh: Tensor,
    dh_last: Tensor | None,
    h: Tensor,
    z: Tensor,
    u: Tensor,
    gamma: Tensor,
    w_g: Tensor,
    h0: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, time, width = z.shape
    heads, head_dim, _ = w_g.shape
    (z, z_row), (u, u_row), (gamma, gamma_row), (dh, dh_row) = _rows(z), _rows(u), _rows(gamma), _rows(dh)
    h, w_g, h0, reset, dh_last = (
        h.contiguous(),
        w_g.contiguous(),
        _contiguous(h0),
        _contiguous(reset),
        _contiguous(dh_last),
    )
    dz, du, dgamma, dh0 = _empty(z.shape), _empty(u.shape, u.dtype), _empty(z.shape), _empty((batch, width))
    groups = _call.recurrence_groups(batch, heads)
    dw_g = _empty(w_g.shape if groups == 1 else (groups, *w_g.shape))
    result = _call.recurrence_backward(
        _TYPE_CODES[u.dtype], batch, time, heads, head_dim, z.data_ptr(), z_row, u.data_ptr(), u_row,
        gamma.data_ptr(), gamma_row, w_g.data_ptr(), _pointer(h0), _pointer(reset), h.data_ptr(), dh.data_ptr(), dh_row,
        _pointer(dh_last), dz.data_ptr(), du.data_ptr(), dgamma.data_ptr(), dw_g.data_ptr(), dh0.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    _check(result)
    return dz, du, dgamma, dw_g if groups == 1 else dw_g.sum(0), dh0


def mdi(
    decay_logits: Tensor,
    decay_bias: Tensor,
    candidate: Tensor,
    gate_logits: Tensor | None,
    gate_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    batch, time, width = candidate.shape
    (decay, decay_row), (candidate, candidate_row) = _rows(decay_logits), _rows(candidate)
    gate, gate_row = (None, 0) if gate_logits is None else _rows(gate_logits)
    decay_bias, gate_bias = decay_bias.contiguous(), _contiguous(gate_bias)
    gamma, x = _empty(candidate.shape), _empty(candidate.shape)
    _call.mdi_forward(
        _TYPE_CODES[candidate.dtype], batch * time, width, decay.data_ptr(), decay_row, decay_bias.data_ptr(),
        candidate.data_ptr(), candidate_row, _pointer(gate), gate_row, _pointer(gate_bias), gamma.data_ptr(),
        x.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return gamma, x


def mdi_backward(
    dgamma: Tensor | None,
    dx: Tensor | None,
    decay_logits: Tensor,
    decay_bias: Tensor,
    candidate: Tensor,
    gate_logits: Tensor | None,
    gate_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, time, width = shape = candidate.shape
    dtype = candidate.dtype
    (decay, decay_row), (candidate, candidate_row) = _rows(decay_logits), _rows(candidate)
    dgamma, dgamma_row = (None, 0) if dgamma is None else _rows(dgamma)
    dx, dx_row = (None, 0) if dx is None else _rows(dx)
    gate, gate_row = (None, 0) if gate_logits is None else _rows(gate_logits)
    decay_bias, gate_bias = decay_bias.contiguous(), _contiguous(gate_bias)
    ddecay, dcandidate, dgate = (
        _empty(shape, dtype),
        _empty(shape, dtype),
        _empty(shape if gate is not None else (0,), dtype),
    )
    ddecay_bias, dgate_bias = _empty((width,)), _empty((width if gate is not None else 0,))
    scratch = _empty((_call.mdi_backward_scratch(batch * time, width),))
    _call.mdi_backward(
        _TYPE_CODES[dtype], batch * time, width, _pointer(dgamma), dgamma_row, _pointer(dx), dx_row, decay.data_ptr(),
        decay_row, decay_bias.data_ptr(), candidate.data_ptr(), candidate_row, _pointer(gate), gate_row,
        _pointer(gate_bias), ddecay.data_ptr(), ddecay_bias.data_ptr(), dcandidate.data_ptr(), dgate.data_ptr(),
        dgate_bias.data_ptr(), scratch.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return ddecay, ddecay_bias, dcandidate, dgate, dgate_bias


def rms_norm(x: Tensor, out_dtype: torch.dtype) -> Tensor:
    x, inner, outer_stride, inner_stride = _two_level_rows(x)
    y = _empty(x.shape, out_dtype)
    n = x.shape[-1]
    _call.rms_norm_forward(
        _TYPE_CODES[x.dtype], _TYPE_CODES[out_dtype], x.numel() // n, n, x.data_ptr(), inner, outer_stride,
        inner_stride, y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y


def rms_norm_backward(dy: Tensor, x: Tensor) -> Tensor:
    (dy, *dy_strides), (x, *strides) = _two_level_rows(dy), _two_level_rows(x)
    dx = _empty(x.shape, x.dtype)
    n = x.shape[-1]
    _call.rms_norm_backward(
        _TYPE_CODES[x.dtype], _TYPE_CODES[dy.dtype], x.numel() // n, n, dy.data_ptr(), *dy_strides, x.data_ptr(),
        *strides, dx.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return dx


def add_rms_norm(x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    (x, x_row), (delta, delta_row) = _flat_rows(x), _flat_rows(delta)
    total, normed = _empty(x.shape), _empty(x.shape, delta.dtype)
    n = x.shape[-1]
    _call.add_rms_norm_forward(
        _TYPE_CODES[delta.dtype], x.numel() // n, n, x.data_ptr(), x_row, delta.data_ptr(), delta_row,
        total.data_ptr(), normed.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return total, normed


def add_rms_norm_backward(dtotal: Tensor | None, dn: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    dtotal, dtotal_row = (None, 0) if dtotal is None else _flat_rows(dtotal)
    (dn, dn_row), total = _flat_rows(dn), total.contiguous()
    dx, ddelta = _empty(total.shape), _empty(total.shape, dn.dtype)
    n = total.shape[-1]
    _call.add_rms_norm_backward(
        _TYPE_CODES[dn.dtype], total.numel() // n, n, _pointer(dtotal), dtotal_row, dn.data_ptr(), dn_row,
        total.data_ptr(), dx.data_ptr(), ddelta.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return dx, ddelta


def readout(h: Tensor, r: Tensor, heads: int) -> Tensor:
    batch, time, width = h.shape
    (h, h_row), (r, r_row) = _rows(h), _rows(r)
    y = _empty(r.shape, r.dtype)
    _call.readout_forward(
        _TYPE_CODES[r.dtype], batch * time, heads, width // heads, h.data_ptr(), h_row, r.data_ptr(), r_row,
        y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y


def readout_backward(dy: Tensor, h: Tensor, r: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    batch, time, width = h.shape
    (dy, dy_row), (h, h_row), (r, r_row) = _rows(dy), _rows(h), _rows(r)
    dh, dr = _empty(h.shape), _empty(r.shape, r.dtype)
    _call.readout_backward(
        _TYPE_CODES[r.dtype], batch * time, heads, width // heads, dy.data_ptr(), dy_row, h.data_ptr(), h_row,
        r.data_ptr(), r_row, dh.data_ptr(), dr.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return dh, dr


def _spacing(x: Tensor) -> int:
    """Distance of the rows of (B, T, D), evenly spaced; the stride of an axis of one element says nothing."""
    return x.stride(1) if x.shape[1] > 1 else x.stride(0)


def gated_scan(
    z: Tensor,
    u: Tensor,
    r: Tensor,
    decay_logits: Tensor,
    decay_bias: Tensor,
    gate_bias: Tensor,
    h0: Tensor | None,
    reset: Tensor | None,
    heads: int,
) -> tuple[Tensor, Tensor]:
    """:func:`mm_rec.ops.mdi` with its gate, :func:`~mm_rec.ops.scan` and :func:`~mm_rec.ops.readout` in one pass.

    z, u and r are (B, T, D) slices of one product, and spaced alike. Returns h and y.
    """
    batch, time, width = z.shape
    h, y = _empty(z.shape), _empty(z.shape, z.dtype)
    _call.gated_scan_forward(
        _TYPE_CODES[z.dtype], batch, time, heads, width // heads, z.data_ptr(), u.data_ptr(), r.data_ptr(), _spacing(z),
        decay_logits.data_ptr(), width, decay_bias.data_ptr(), gate_bias.data_ptr(), _pointer(h0), _pointer(reset),
        h.data_ptr(), y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return h, y


def gated_scan_backward(
    dy: Tensor,
    dh_last: Tensor | None,
    h: Tensor,
    z: Tensor,
    u: Tensor,
    r: Tensor,
    decay_logits: Tensor,
    decay_bias: Tensor,
    gate_bias: Tensor,
    h0: Tensor | None,
    reset: Tensor | None,
    heads: int,
    dz: Tensor,
    du: Tensor,
    dr: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Write dz, du and dr, slices as z, u and r are; return the gradients of decay_logits, the biases, and h0."""
    batch, time, width = z.shape
    dh_last = _contiguous(dh_last)
    ddecay, dh0 = _empty(z.shape, z.dtype), _empty((batch, width))
    ddecay_bias, dgate_bias = _empty((batch, width)), _empty((batch, width))  # a share per sequence
    result = _call.gated_scan_backward(
        _TYPE_CODES[z.dtype], batch, time, heads, width // heads, z.data_ptr(), u.data_ptr(), r.data_ptr(), _spacing(z),
        decay_logits.data_ptr(), width, decay_bias.data_ptr(), gate_bias.data_ptr(), _pointer(h0), _pointer(reset),
        h.data_ptr(), dy.data_ptr(), width, _pointer(dh_last), dz.data_ptr(), du.data_ptr(), dr.data_ptr(),
        _spacing(dz), ddecay.data_ptr(), ddecay_bias.data_ptr(), dgate_bias.data_ptr(), dh0.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    _check(result)
    return ddecay, ddecay_bias.sum(0), dgate_bias.sum(0), dh0


def relu_squared(x: Tensor) -> Tensor:
    x = x.contiguous()
    y = _empty(x.shape, x.dtype)
    _call.relu_squared_forward(_TYPE_CODES[x.dtype], x.numel(), x.data_ptr(), y.data_ptr(), torch.get_num_threads())
    return y


def relu_squared_backward(dy: Tensor, x: Tensor) -> Tensor:
    dy, x = dy.contiguous(), x.contiguous()
    return relu_squared_backward_into(dy, x, _empty(x.shape, x.dtype))


def relu_squared_backward_into(dy: Tensor, x: Tensor, dx: Tensor) -> Tensor:
    """Write the gradient at x into dx, which may be dy; all contiguous."""
    _call.relu_squared_backward(
        _TYPE_CODES[x.dtype], x.numel(), dy.data_ptr(), x.data_ptr(), dx.data_ptr(), torch.get_num_threads()
    )
    return dx


@functools.lru_cache(maxsize=16)
def _rotary_tables(length: int, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles, (length, d / 2) each, as in :func:`mm_rec.ops.reference.rotate`."""
    angle = rotary_angles(torch.arange(length), head_dim, base)
    return angle.cos().float(), angle.sin().float()


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
    batch, time = position.shape
    window, (heads, slots, head_dim) = k.shape[1] - time, address.shape
    (k, k_row), (v, v_row) = _head_rows(k), _head_rows(v)
    address, rate, position = address.contiguous(), rate.contiguous(), position.contiguous()
    key0, value0, mass0 = key0.contiguous(), value0.contiguous(), mass0.contiguous()
    versions = -(-time // (window // 2)) + 1
    key, value = (_empty((batch, versions, heads, slots, head_dim)) for _ in range(2))
    mass = _empty((batch, versions, heads, slots))
    result = _call.memory_update(
        _TYPE_CODES[k.dtype], batch, time, window, heads, head_dim, slots, position.data_ptr(), k.data_ptr(), k_row,
        v.data_ptr(), v_row, address.data_ptr(), rate.data_ptr(), key0.data_ptr(), value0.data_ptr(), mass0.data_ptr(),
        key.data_ptr(), value.data_ptr(), mass.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    _check(result)
    return key, value, mass


def memory_update_backward(
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
    batch, time = position.shape
    window, (heads, slots, head_dim) = k.shape[1] - time, address.shape
    (k, k_row), (v, v_row) = _head_rows(k), _head_rows(v)
    address, rate, position = address.contiguous(), rate.contiguous(), position.contiguous()
    key, value, mass = key.contiguous(), value.contiguous(), mass.contiguous()
    dkey, dvalue, dmass = dkey.contiguous(), dvalue.contiguous(), dmass.contiguous()
    dk, dv = _empty(k.shape, k.dtype), _empty(v.shape, v.dtype)
    daddress, drate = _empty((batch, *address.shape)), _empty((batch, heads))  # a share per sequence
    dkey0, dvalue0 = (_empty((batch, heads, slots, head_dim)) for _ in range(2))
    dmass0 = _empty((batch, heads, slots))
    result = _call.memory_update_backward(
        _TYPE_CODES[k.dtype], batch, time, window, heads, head_dim, slots, position.data_ptr(), k.data_ptr(), k_row,
        v.data_ptr(), v_row, address.data_ptr(), rate.data_ptr(), key.data_ptr(), value.data_ptr(), mass.data_ptr(),
        dkey.data_ptr(), dvalue.data_ptr(), dmass.data_ptr(), dk.data_ptr(), dv.data_ptr(), daddress.data_ptr(),
        drate.data_ptr(), dkey0.data_ptr(), dvalue0.data_ptr(), dmass0.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    _check(result)
    return dk, dv, daddress.sum(0), drate.sum(0), dkey0, dvalue0, dmass0


def memory_read(
    q: Tensor, k: Tensor, v: Tensor, key: Tensor, value: Tensor, mass: Tensor, position: Tensor, rotary_base: float
) -> tuple[Tensor, Tensor]:
    batch, time, heads, head_dim = q.shape
    window, slots = k.shape[1] - time, key.shape[3]
    (q, q_row), (k, k_row), (v, v_row) = _head_rows(q), _head_rows(k), _head_rows(v)
    key, value, mass, position = key.contiguous(), value.contiguous(), mass.contiguous(), position.contiguous()
    cosine, sine = _rotary_tables(window + time, head_dim, rotary_base)
    out, lse = _empty(q.shape, q.dtype), _empty((batch, heads, time))
    result = _call.memory_read(
        _TYPE_CODES[q.dtype], batch, time, window, heads, head_dim, slots, position.data_ptr(), q.data_ptr(), q_row,
        k.data_ptr(), k_row, v.data_ptr(), v_row, key.data_ptr(), value.data_ptr(), mass.data_ptr(),
        cosine.data_ptr(), sine.data_ptr(), out.data_ptr(), lse.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    _check(result)
    return out, lse


def memory_read_backward(
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
    batch, time, heads, head_dim = q.shape
    window, slots = k.shape[1] - time, key.shape[3]
    (q, q_row), (k, k_row), (v, v_row), (dout, dout_row) = _head_rows(q), _head_rows(k), _head_rows(v), _head_rows(dout)
    key, value, mass, position = key.contiguous(), value.contiguous(), mass.contiguous(), position.contiguous()
    out, lse = out.contiguous(), lse.contiguous()
    cosine, sine = _rotary_tables(window + time, head_dim, rotary_base)
    dq, dk, dv = (_empty(x.shape, x.dtype) for x in (q, k, v))
    dkey, dvalue, dmass = (_empty(x.shape) for x in (key, value, mass))
    result = _call.memory_read_backward(
        _TYPE_CODES[q.dtype], batch, time, window, heads, head_dim, slots, position.data_ptr(), q.data_ptr(), q_row,
        k.data_ptr(), k_row, v.data_ptr(), v_row, key.data_ptr(), value.data_ptr(), mass.data_ptr(),
        cosine.data_ptr(), sine.data_ptr(), dout.data_ptr(), dout_row, out.data_ptr(), lse.data_ptr(), dq.data_ptr(),
        dk.data_ptr(), dv.data_ptr(), dkey.data_ptr(), dvalue.data_ptr(), dmass.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    _check(result)
    return dq, dk, dv, dkey, dvalue, dmass


def _logits_buffer(rows: int, vocabulary: int, dtype: torch.dtype) -> Tensor:
    kept: Tensor | None = getattr(_kept, "logits", None)
    if kept is None or kept.dtype != dtype or kept.numel() < rows * vocabulary:
        with torch.inference_mode(False):  # an inference tensor could not be written to outside that mode later
            kept = _kept.logits = _empty((rows * vocabulary,), dtype)
    return kept[: rows * vocabulary].view(rows, vocabulary)


def linear_cross_entropy(
    y: Tensor, embedding: Tensor, targets: Tensor, weight: Tensor, needs_dy: bool, needs_dembedding: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = len(y)
    vocabulary = embedding.shape[0]
    low, high = targets.aminmax()
    if low < 0 or high >= vocabulary:
        raise IndexError(f"targets must be in [0, {vocabulary}), got {int(low)} to {int(high)}")
    kept = weight.nonzero().squeeze(1)
    if len(kept) < rows:
        return _selected_rows_cross_entropy(y, embedding, targets, weight, kept, needs_dy, needs_dembedding)

    targets, weight, dtype = targets.contiguous(), weight.contiguous(), y.dtype
    chunks = -(-rows * vocabulary * y.element_size() // LOGIT_BYTES)
    chunk = -(-rows // chunks)
    logits = _logits_buffer(chunk, vocabulary, dtype)
    nll = _empty((rows,))
    dy = _empty(y.shape if needs_dy else (0,), dtype)
    dembedding = _empty(embedding.shape if needs_dembedding else (0,), dtype)
    total = (
        torch.zeros_like(dembedding, dtype=torch.float32) if chunks > 1 else None
    )  # bfloat16 would round every chunk
    for begin in range(0, rows, chunk):
        part = slice(begin, min(rows, begin + chunk))
        out = logits[: part.stop - begin]
        matmul.mm(y[part], embedding.t(), out)
        result = _call.cross_entropy(
            _TYPE_CODES[dtype], len(out), vocabulary, out.data_ptr(), targets[part].data_ptr(),
            weight[part].data_ptr(), nll[part].data_ptr(), needs_dy or needs_dembedding, torch.get_num_threads(),
        )  # fmt: skip
        _check(result)
        if needs_dy:
            matmul.mm(out, embedding, dy[part])
        if needs_dembedding:
            if total is None:
                matmul.mm(out.t(), y[part], dembedding)
            else:
                matmul.add_mm(total, out.t(), y[part], dembedding)
    if total is not None:
        dembedding.copy_(total)
    return torch.dot(weight, nll), nll, dy, dembedding


def _selected_rows_cross_entropy(
    y: Tensor,
    embedding: Tensor,
    targets: Tensor,
    weight: Tensor,
    kept: Tensor,
    needs_dy: bool,
    needs_dembedding: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same where some weights are 0: only the others are computed."""
    nll, dy = torch.zeros_like(weight), torch.zeros_like(y) if needs_dy else _empty((0,), y.dtype)
    if not len(kept):
        dembedding = torch.zeros_like(embedding) if needs_dembedding else _empty((0,), y.dtype)
        return nll.sum(), nll, dy, dembedding
    loss, kept_nll, kept_dy, dembedding = linear_cross_entropy(
        y[kept], embedding, targets[kept], weight[kept], needs_dy, needs_dembedding
    )
    nll[kept] = kept_nll
    if needs_dy:
        dy[kept] = kept_dy
    return loss, nll, dy, dembedding


def adamw_(updates: Sequence[Update]) -> Callable[..., None]:
    return functools.partial(_adamw_many, updates)


def _adamw_many(
    updates: Sequence[Update], norm: Tensor, lr: float, beta1: float, beta2: float, eps: float, max_norm: float
) -> None:
    total = float(norm)
    if not math.isfinite(total):
        return
    scale = min(1.0, max_norm / total) if max_norm and total else 1.0
    settings: list[float] = []
    for one in updates:
        one.step.add_(1)
        step = int(one.step)
        rate, inverse = lr / (1 - beta1**step), 1 / (1 - beta2**step)
        settings += (beta1, beta2, eps, 1 - lr * one.weight_decay, rate, inverse, scale)
    _call.adamw_many(
        len(updates), _sizes([one.master for one in updates]), _pointers([one.master for one in updates]),
        _pointers([one.m for one in updates]), _pointers([one.v for one in updates]),
        _pointers([one.grad for one in updates]), _types([one.grad for one in updates]),
        _pointers([one.param_out for one in updates]), (ctypes.c_float * len(settings))(*settings),
        torch.get_num_threads(),
    )  # fmt: skip


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    tensors = [x.contiguous() for x in tensors]
    total = _call.sum_of_squares(
        len(tensors), _pointers(tensors), _sizes(tensors), _types(tensors), torch.get_num_threads()
    )
    return torch.tensor(total, dtype=torch.float64)


def _pointers(tensors: Sequence[Tensor | None]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*map(_pointer, tensors))


def _sizes(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(tensors))(*[x.numel() for x in tensors])


def _types(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_int32]:
    return (ctypes.c_int32 * len(tensors))(*[_TYPE_CODES[x.dtype] for x in tensors])
