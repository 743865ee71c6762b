"""The CUDA back end: the kernels of ``mm_rec/cpp/cuda`` on PyTorch tensors.

Every function has the arguments of the op's schema and enqueues its work on the current stream. Inputs may be
strided as long as rows are evenly spaced; others are copied. Results are contiguous.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mm_rec.ops.backend import Native, NativeUnavailableError
from mm_rec.ops.cuda_library import CudaLibrary, DoesNotFitError, all_dense, dense, nested_rows, rows_of
from mm_rec.ops.optimizer import Update
from mm_rec.ops.reference import rotary_angles

__all__ = ["load"]

LOGITS_BYTES = 1 << 30  # of the chunk of logits that exists at a time
_OLDEST = (8, 0)  # compute capability: bfloat16 matrix units, asynchronous copies
_DTYPES = {torch.float32: 0, torch.bfloat16: 1}

_library: CudaLibrary  # set by load()


def load() -> Native:
    """Load the library and return its kernels, by op name.

    Raises:
        NativeUnavailableError: the library is missing or broken, or the device is too old for it.
    """
    global _library
    capability = torch.cuda.get_device_capability()
    if capability < _OLDEST:
        raise NativeUnavailableError(
            f"this device has compute capability {capability}, the CUDA kernels need {_OLDEST}"
        )
    from mm_rec.ops import cuda_fused  # which needs this module

    _library = CudaLibrary()
    kernels: list[Callable[..., Any]] = [
        recurrence, recurrence_backward, scan, scan_backward, mdi, mdi_backward, rms_norm, rms_norm_backward,
        add_rms_norm, add_rms_norm_backward, readout, readout_backward, relu_squared, relu_squared_backward,
        memory_update, memory_update_backward, memory_read, memory_read_backward, linear_cross_entropy, adamw_,
        sum_of_squares, *cuda_fused.KERNELS,
    ]  # fmt: skip
    level = "sm_{}{}".format(*capability)
    return Native(str(_library.path), level, {kernel.__name__: kernel for kernel in kernels}, fits)


def fits(op: str, dtype: torch.dtype, dim: int, slots: int) -> bool:
    """Whether the current device has the shared memory that a memory op wants both ways."""
    limit = os.environ.get("MM_REC_CUDA_SHARED_MEMORY")  # read by device.cuh
    return _fits(op, dtype, dim, slots, torch.cuda.current_device(), limit)


@functools.cache
def _fits(op: str, dtype: torch.dtype, dim: int, slots: int, device: int, limit: str | None) -> bool:
    """Run the kernels on one token that writes: only when they are started do they know."""

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    window, context, memory = 2, zeros(1, 3, 1, dim, dtype=dtype), zeros(1, 2, 1, slots, dim)
    mass, position = zeros(1, 2, 1, slots), torch.full((1, 1), window, device=device)
    try:
        if op == "memory_update":
            inputs = (context, context, memory[0, 0], zeros(1), position)
            memory_update(*inputs, memory[:, 0], memory[:, 0], mass[:, 0])
            memory_update_backward(memory, memory, mass, memory, memory, mass, *inputs)
        else:
            read = (context[:, 2:], context, context, memory, memory, mass, position, 1000.0)
            out, lse = memory_read(*read)
            memory_read_backward(out, out, lse, *read)
    except DoesNotFitError:
        return False
    return True


def _empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for a result on the device of ``like``, uninitialised: the kernel writes every element."""
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)


def _empty_like(*tensors: Tensor) -> Any:
    """Memory for results of the shapes and types of ``tensors``, contiguous."""
    found = [_empty(x, *x.shape) for x in tensors]
    return found[0] if len(found) == 1 else found


def _workspace(name: str, like: Tensor, *sizes: int) -> Tensor:
    """Scratch memory for a function of the library."""
    return _empty(like, _library.size(name, like, *sizes), dtype=torch.uint8)


def recurrence(
    z: Tensor, u: Tensor, gamma: Tensor, w_g: Tensor, h0: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    z, gamma, w_g, h0, reset = all_dense(z, gamma, w_g, h0, reset)
    u, u_stride = rows_of(u)
    batch, time, width = z.shape
    heads, dim, _ = w_g.shape
    h, h_last = _empty(z, batch, time, width), _empty(z, batch, width)
    _library.call(
        "recurrence_forward", z, z, u, _DTYPES[u.dtype], u_stride, None, gamma, w_g, h0, reset, h, h_last,
        batch, time, heads, dim,
    )  # fmt: skip
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
    dh, dh_last, z, gamma, w_g, h0, reset = all_dense(dh, dh_last, z, gamma, w_g, h0, reset)
    u, u_stride = rows_of(u)
    heads, dim, _ = w_g.shape
    sizes = (*z.shape[:2], heads, dim)
    dz, du, dgamma, dw_g = _empty_like(z, u, gamma, w_g)
    dh0 = _empty(z, z.shape[0], z.shape[2])
    workspace = _workspace("recurrence_backward", z, *sizes)
    _library.call(
        "recurrence_backward", z, dh, dh_last, h, z, u, _DTYPES[u.dtype], u_stride, None, gamma, w_g, h0, reset,
        dz, du, z.shape[2], None, dgamma, dw_g, dh0, workspace, *sizes,
    )  # fmt: skip
    return dz, du, dgamma, dw_g, dh0


def scan(a: Tensor, x: Tensor, s0: Tensor | None, reset: Tensor | None) -> Tensor:
    a, x, s0, reset = all_dense(a, x, s0, reset)
    s: Tensor = _empty_like(x)
    _library.call("scan_forward", x, a, x, s0, reset, s, _workspace("scan", x, *x.shape, False), *x.shape)
    return s


def scan_backward(
    ds: Tensor, s: Tensor, a: Tensor, s0: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    ds, a, s0, reset = all_dense(ds, a, s0, reset)
    da, dx = _empty_like(a, a)
    ds0 = _empty(a, a.shape[0], a.shape[2])
    workspace = _workspace("scan", a, *a.shape, True)
    _library.call("scan_backward", a, ds, s, a, s0, reset, da, dx, ds0, workspace, *a.shape)
    return da, dx, ds0


def mdi(
    decay_logits: Tensor,
    decay_bias: Tensor,
    candidate: Tensor,
    gate_logits: Tensor | None,
    gate_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    inputs, rows, width = _mdi_inputs(decay_logits, decay_bias, candidate, gate_logits, gate_bias)
    gamma, x = (_empty(candidate, *candidate.shape, dtype=torch.float32) for _ in range(2))
    _library.call("mdi_forward", x, *inputs, gamma, x, rows, width)
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
    dgamma, dx = all_dense(dgamma, dx)
    inputs, rows, width = _mdi_inputs(decay_logits, decay_bias, candidate, gate_logits, gate_bias)
    ddecay, dcandidate, ddecay_bias = _empty_like(candidate, candidate, decay_bias)
    if gate_logits is None or gate_bias is None:
        dgate, dgate_bias = _empty(candidate, 0), _empty(decay_bias, 0)
    else:
        dgate, dgate_bias = _empty_like(gate_logits, gate_bias)
    workspace = _workspace("mdi_backward", candidate, rows, width)
    _library.call(
        "mdi_backward", candidate, dgamma, dx, *inputs, ddecay, ddecay_bias, dcandidate, width, dgate,
        dgate_bias, workspace, rows, width,
    )  # fmt: skip
    return ddecay, ddecay_bias, dcandidate, dgate, dgate_bias


def rms_norm(x: Tensor, out_dtype: torch.dtype) -> Tensor:
    x, *layout = nested_rows(x)
    y = _empty(x, *x.shape, dtype=out_dtype)
    _library.call("rms_norm_forward", x, x, _DTYPES[x.dtype], *layout, y, _DTYPES[out_dtype], *_matrix(x))
    return y


def rms_norm_backward(dy: Tensor, x: Tensor) -> Tensor:
    dy = dense(dy)
    x, *layout = nested_rows(x)
    dx: Tensor = _empty_like(x)
    _library.call("rms_norm_backward", x, dy, _DTYPES[dy.dtype], x, _DTYPES[x.dtype], *layout, dx, *_matrix(x))
    return dx


def add_rms_norm(x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    x, delta = all_dense(x, delta)
    total, normed = _empty_like(x), _empty_like(delta)
    _library.call(
        "add_rms_norm_forward", x, x, _DTYPES[x.dtype], delta, _DTYPES[delta.dtype], total, normed, *_matrix(x)
    )
    return total, normed


def add_rms_norm_backward(dtotal: Tensor | None, dn: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    dtotal, dn, total = all_dense(dtotal, dn, total)
    dx, ddelta = _empty_like(total), _empty_like(dn)
    _library.call(
        "add_rms_norm_backward", total, dtotal, dn, _DTYPES[dn.dtype], total, _DTYPES[total.dtype], dx, ddelta,
        *_matrix(total),
    )  # fmt: skip
    return dx, ddelta


def readout(h: Tensor, r: Tensor, heads: int) -> Tensor:
    h = dense(h)
    r, stride = rows_of(r)
    y: Tensor = _empty_like(r)
    tokens, width = _matrix(h)
    _library.call("readout_forward", h, h, r, _DTYPES[r.dtype], stride, y, tokens, heads, width // heads)
    return y


def readout_backward(dy: Tensor, h: Tensor, r: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    dy, h = all_dense(dy, h)
    r, stride = rows_of(r)
    dh, dr = _empty_like(h, r)
    tokens, width = _matrix(h)
    _library.call(
        "readout_backward", h, dy, h, r, _DTYPES[r.dtype], stride, dh, dr, width, tokens, heads, width // heads
    )
    return dh, dr


def relu_squared(x: Tensor) -> Tensor:
    x = dense(x)
    y: Tensor = _empty_like(x)
    _library.call("relu_squared_forward", x, x, y, _DTYPES[x.dtype], x.numel())
    return y


def relu_squared_backward(dy: Tensor, x: Tensor) -> Tensor:
    dy, x = all_dense(dy, x)
    dx: Tensor = _empty_like(x)
    _library.call("relu_squared_backward", x, dy, x, dx, _DTYPES[x.dtype], x.numel())
    return dx


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
    k, v, address, rate, position, *before = all_dense(k, v, address, rate, position, key0, value0, mass0)
    sizes = batch, time, heads, dim, slots, window = _memory_sizes(k, position, address.shape[1])
    versions = -(-time // (window // 2)) + 1
    key, value = (_empty(address, batch, versions, heads, slots, dim) for _ in range(2))
    mass = _empty(address, batch, versions, heads, slots)
    workspace = _workspace("memory_update", k, batch, time, window)
    _library.call(
        "memory_update_forward", k, k, v, _DTYPES[k.dtype], address, rate, position, *before, key, value, mass,
        workspace, *sizes,
    )  # fmt: skip
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
    dkey, dvalue, dmass, k, v, address, rate, position = all_dense(dkey, dvalue, dmass, k, v, address, rate, position)
    sizes = _memory_sizes(k, position, address.shape[1])
    gradients = _empty_like(k, v, address, rate, key[:, 0], value[:, 0], mass[:, 0])
    _library.call(
        "memory_update_backward", k, dkey, dvalue, dmass, key, value, mass, k, v, _DTYPES[k.dtype], address, rate,
        position, *gradients, _workspace("memory_update_backward", k, *sizes), *sizes,
    )  # fmt: skip
    return tuple(gradients)


def memory_read(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key: Tensor,
    value: Tensor,
    mass: Tensor,
    position: Tensor,
    rotary_base: float,
) -> tuple[Tensor, Tensor]:
    q, k, v, key, value, mass, position = all_dense(q, k, v, key, value, mass, position)
    sizes = batch, time, heads, dim, _, window = _memory_sizes(k, position, key.shape[3])
    out, lse = _empty_like(q), _empty(mass, batch, heads, time)
    rotary = _rotary_table(window, dim, rotary_base, q.device)
    workspace = _workspace("memory_read", q, batch, time, heads, window)
    _library.call(
        "memory_read_forward", q, q, k, v, _DTYPES[q.dtype], key, value, mass, position, rotary, out, lse,
        workspace, *sizes,
    )  # fmt: skip
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
    dout, out, q, k, v, key, value, mass, position = all_dense(dout, out, q, k, v, key, value, mass, position)
    sizes = batch, time, heads, dim, _, window = _memory_sizes(k, position, key.shape[3])
    gradients = _empty_like(q, k, v, key, value, mass)
    rotary = _rotary_table(window, dim, rotary_base, q.device)
    workspace = _workspace("memory_read", q, batch, time, heads, window)
    _library.call(
        "memory_read_backward", q, dout, out, lse, q, k, v, _DTYPES[q.dtype], key, value, mass, position, rotary,
        *gradients, workspace, *sizes,
    )  # fmt: skip
    return tuple(gradients)


def linear_cross_entropy(
    y: Tensor,
    embedding: Tensor,
    targets: Tensor,
    weight: Tensor,
    needs_dy: bool,
    needs_dembedding: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, embedding, targets, weight = all_dense(y, embedding, targets, weight)
    rows, vocabulary = y.shape[0], embedding.shape[0]
    gradient = needs_dy or needs_dembedding
    nll = _empty_like(weight)
    dy = _empty_like(y) if needs_dy else _empty(y, 0)
    dembedding = _empty_like(embedding) if needs_dembedding else _empty(embedding, 0)
    total: Tensor | None = None  # dembedding of several chunks, in float32
    # A loss alone (evaluation) is worth float32 logits; training rounds them like any activation.
    logits_dtype = y.dtype if gradient else torch.float32
    chunk = max(1, LOGITS_BYTES // (vocabulary * logits_dtype.itemsize))
    for first in range(0, rows, chunk):
        part = slice(first, first + chunk)
        logits = _product(y[part], embedding.t(), logits_dtype)
        _library.call(
            "softmax_gradient", y, logits, _DTYPES[logits_dtype], targets[part], weight[part], nll[part],
            *logits.shape, gradient,
        )  # fmt: skip
        if needs_dy:
            torch.mm(logits, embedding, out=dy[part])
        if needs_dembedding and chunk >= rows:
            torch.mm(logits.t(), y, out=dembedding)
        elif needs_dembedding:
            product = _product(logits.t(), y[part], torch.float32)
            total = product if total is None else total.add_(product)
    if total is not None:
        dembedding.copy_(total)
    return torch.dot(nll, weight), nll, dy, dembedding


def adamw_(updates: Sequence[Update]) -> Callable[..., None]:
    table: list[int] = []
    for one in updates:
        rounded = 0 if one.param_out is None else one.param_out.data_ptr()
        table += (
            one.master.data_ptr(), one.m.data_ptr(), one.v.data_ptr(), one.grad.data_ptr(), rounded,
            one.step.data_ptr(), one.master.numel(), _DTYPES[one.grad.dtype],
        )  # fmt: skip
    rows = (ctypes.c_int64 * len(table))(*table)
    decays = (ctypes.c_double * len(updates))(*[one.weight_decay for one in updates])
    workspace = _workspace("adamw_many", updates[0].master, len(updates))

    def run(norm: Tensor, lr: float, beta1: float, beta2: float, eps: float, max_norm: float) -> None:
        _library.call(
            "adamw_many", norm, len(updates), rows, decays, norm, float(max_norm), float(lr), beta1, beta2, eps,
            workspace,
        )  # fmt: skip

    return run


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    tensors = all_dense(*tensors)
    table = [value for x in tensors for value in (x.data_ptr(), x.numel(), _DTYPES[x.dtype])]
    partial = _empty(tensors[0], _library.size("sum_of_squares", tensors[0], len(tensors)), dtype=torch.float64)
    total = _empty(tensors[0], dtype=torch.float64)
    _library.call("sum_of_squares", total, len(tensors), (ctypes.c_int64 * len(table))(*table), partial, total)
    return total


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Matrix product with a result of another type than the operands', added up in float32 either way."""
    return torch.mm(a, b) if a.dtype == dtype else torch.mm(a, b, out_dtype=dtype)


def _matrix(x: Tensor) -> tuple[int, int]:
    """Rows and columns of ``x`` seen as a matrix along its last axis."""
    return x.numel() // x.shape[-1], x.shape[-1]


def _memory_sizes(k: Tensor, position: Tensor, slots: int) -> tuple[int, int, int, int, int, int]:
    """B, T, H, d, S and W of the memory ops; the kernels are written for even d up to 256."""
    batch, time = position.shape
    if k.shape[3] % 2 or k.shape[3] > 256:
        raise ValueError(f"the CUDA kernels take heads of even size up to 256, got {k.shape[3]}")
    return batch, time, k.shape[2], k.shape[3], slots, k.shape[1] - time


@functools.lru_cache(maxsize=16)
def _rotary_table(window: int, dim: int, base: float, device: torch.device) -> Tensor:
    """Cosine and sine of distance times frequency, (W + 2176, 2, d / 2): all that 34 tiles of 64 tokens meet."""
    angle = rotary_angles(torch.arange(window + 2176), dim, base)
    return torch.stack([angle.cos(), angle.sin()], dim=1).float().to(device)


def _mdi_inputs(
    decay_logits: Tensor,
    decay_bias: Tensor,
    candidate: Tensor,
    gate_logits: Tensor | None,
    gate_bias: Tensor | None,
) -> tuple[list[Any], int, int]:
    """The input arguments that both directions of mdi share, then rows and columns."""
    gate = (None, 0) if gate_logits is None else rows_of(gate_logits)
    inputs = [
        *rows_of(decay_logits), decay_bias, *rows_of(candidate), *gate, gate_bias, _DTYPES[candidate.dtype],
    ]  # fmt: skip
    return inputs, *_matrix(candidate)
