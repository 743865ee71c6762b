"""Ops that walk through time: scan, recurrence, mdi and the gated scan of a linear block."""

from __future__ import annotations

import torch
from torch import Tensor

from mm_rec.ops.cpu import common
from mm_rec.ops.cpu.common import TYPE_CODES, check, contiguous, pointer, rows_of

__all__ = ["KERNELS", "gated_scan", "gated_scan_backward"]


def scan(a: Tensor, x: Tensor, s0: Tensor | None, reset: Tensor | None) -> Tensor:
    batch, time, width = x.shape
    (a, a_row), (x, x_row), s0, reset = rows_of(a), rows_of(x), contiguous(s0), contiguous(reset)
    s = common.empty(x.shape)
    common.call.scan_forward(
        batch, time, width, a.data_ptr(), a_row, x.data_ptr(), x_row, pointer(s0), pointer(reset), s.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return s


def scan_backward(
    ds: Tensor, s: Tensor, a: Tensor, s0: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    batch, time, width = s.shape
    (ds, ds_row), (a, a_row), s = rows_of(ds), rows_of(a), s.contiguous()
    s0, reset = contiguous(s0), contiguous(reset)
    da, dx, ds0 = common.empty(s.shape), common.empty(s.shape), common.empty((batch, width))
    common.call.scan_backward(
        batch, time, width, ds.data_ptr(), ds_row, s.data_ptr(), a.data_ptr(), a_row, pointer(s0), pointer(reset),
        da.data_ptr(), dx.data_ptr(), ds0.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return da, dx, ds0


def recurrence(
    z: Tensor, u: Tensor, gamma: Tensor, w_g: Tensor, h0: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    batch, time, width = z.shape
    heads, head_dim, _ = w_g.shape
    (z, z_row), (u, u_row), (gamma, gamma_row) = rows_of(z), rows_of(u), rows_of(gamma)
    w_g, h0, reset = w_g.contiguous(), contiguous(h0), contiguous(reset)
    h, h_last = common.empty(z.shape), common.empty((batch, width))
    result = common.call.recurrence_forward(
        TYPE_CODES[u.dtype], batch, time, heads, head_dim, z.data_ptr(), z_row, u.data_ptr(), u_row,
        gamma.data_ptr(), gamma_row, w_g.data_ptr(), pointer(h0), pointer(reset), h.data_ptr(), h_last.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    check(result)
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
    (z, z_row), (u, u_row), (gamma, gamma_row), (dh, dh_row) = rows_of(z), rows_of(u), rows_of(gamma), rows_of(dh)
    h, w_g, h0, reset, dh_last = (
        h.contiguous(),
        w_g.contiguous(),
        contiguous(h0),
        contiguous(reset),
        contiguous(dh_last),
    )
    dz, du, dgamma, dh0 = (
        common.empty(z.shape),
        common.empty(u.shape, u.dtype),
        common.empty(z.shape),
        common.empty((batch, width)),
    )
    groups = common.call.recurrence_groups(batch, heads)
    dw_g = common.empty(w_g.shape if groups == 1 else (groups, *w_g.shape))
    result = common.call.recurrence_backward(
        TYPE_CODES[u.dtype], batch, time, heads, head_dim, z.data_ptr(), z_row, u.data_ptr(), u_row,
        gamma.data_ptr(), gamma_row, w_g.data_ptr(), pointer(h0), pointer(reset), h.data_ptr(), dh.data_ptr(), dh_row,
        pointer(dh_last), dz.data_ptr(), du.data_ptr(), dgamma.data_ptr(), dw_g.data_ptr(), dh0.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    check(result)
    return dz, du, dgamma, dw_g if groups == 1 else dw_g.sum(0), dh0


def mdi(
    decay_logits: Tensor,
    decay_bias: Tensor,
    candidate: Tensor,
    gate_logits: Tensor | None,
    gate_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    batch, time, width = candidate.shape
    (decay, decay_row), (candidate, candidate_row) = rows_of(decay_logits), rows_of(candidate)
    gate, gate_row = (None, 0) if gate_logits is None else rows_of(gate_logits)
    decay_bias, gate_bias = decay_bias.contiguous(), contiguous(gate_bias)
    gamma, x = common.empty(candidate.shape), common.empty(candidate.shape)
    common.call.mdi_forward(
        TYPE_CODES[candidate.dtype], batch * time, width, decay.data_ptr(), decay_row, decay_bias.data_ptr(),
        candidate.data_ptr(), candidate_row, pointer(gate), gate_row, pointer(gate_bias), gamma.data_ptr(),
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
    (decay, decay_row), (candidate, candidate_row) = rows_of(decay_logits), rows_of(candidate)
    dgamma, dgamma_row = (None, 0) if dgamma is None else rows_of(dgamma)
    dx, dx_row = (None, 0) if dx is None else rows_of(dx)
    gate, gate_row = (None, 0) if gate_logits is None else rows_of(gate_logits)
    decay_bias, gate_bias = decay_bias.contiguous(), contiguous(gate_bias)
    ddecay, dcandidate, dgate = (
        common.empty(shape, dtype),
        common.empty(shape, dtype),
        common.empty(shape if gate is not None else (0,), dtype),
    )
    ddecay_bias, dgate_bias = common.empty((width,)), common.empty((width if gate is not None else 0,))
    scratch = common.empty((common.call.mdi_backward_scratch(batch * time, width),))
    common.call.mdi_backward(
        TYPE_CODES[dtype], batch * time, width, pointer(dgamma), dgamma_row, pointer(dx), dx_row, decay.data_ptr(),
        decay_row, decay_bias.data_ptr(), candidate.data_ptr(), candidate_row, pointer(gate), gate_row,
        pointer(gate_bias), ddecay.data_ptr(), ddecay_bias.data_ptr(), dcandidate.data_ptr(), dgate.data_ptr(),
        dgate_bias.data_ptr(), scratch.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return ddecay, ddecay_bias, dcandidate, dgate, dgate_bias


def _spacing(x: Tensor) -> int:
    """Returns the distance of the evenly spaced rows of (B, T, D); the stride of an axis of size 1 is arbitrary."""
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

    z, u and r are (B, T, D) slices of one product, with the same distance between rows. Returns h and y.
    """
    batch, time, width = z.shape
    h, y = common.empty(z.shape), common.empty(z.shape, z.dtype)
    common.call.gated_scan_forward(
        TYPE_CODES[z.dtype], batch, time, heads, width // heads, z.data_ptr(), u.data_ptr(), r.data_ptr(), _spacing(z),
        decay_logits.data_ptr(), width, decay_bias.data_ptr(), gate_bias.data_ptr(), pointer(h0), pointer(reset),
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
    """Write dz, du and dr, which are slices like z, u and r; return the gradients of decay_logits, biases and h0."""
    batch, time, width = z.shape
    dh_last = contiguous(dh_last)
    ddecay, dh0 = common.empty(z.shape, z.dtype), common.empty((batch, width))
    ddecay_bias, dgate_bias = common.empty((batch, width)), common.empty((batch, width))  # a share per sequence
    result = common.call.gated_scan_backward(
        TYPE_CODES[z.dtype], batch, time, heads, width // heads, z.data_ptr(), u.data_ptr(), r.data_ptr(), _spacing(z),
        decay_logits.data_ptr(), width, decay_bias.data_ptr(), gate_bias.data_ptr(), pointer(h0), pointer(reset),
        h.data_ptr(), dy.data_ptr(), width, pointer(dh_last), dz.data_ptr(), du.data_ptr(), dr.data_ptr(),
        _spacing(dz), ddecay.data_ptr(), ddecay_bias.data_ptr(), dgate_bias.data_ptr(), dh0.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    check(result)
    return ddecay, ddecay_bias.sum(0), dgate_bias.sum(0), dh0


KERNELS = (recurrence, recurrence_backward, scan, scan_backward, mdi, mdi_backward)
