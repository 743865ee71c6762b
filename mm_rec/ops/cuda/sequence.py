"""Ops that walk through time: scan, recurrence and mdi."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mm_rec.ops.cuda import common
from mm_rec.ops.cuda.common import TYPE_CODES, all_dense, empty_like, matrix_of, rows_of, workspace_of
from mm_rec.ops.cuda.load_library import cuda_library

__all__ = ["KERNELS", "mdi"]


def scan(a: Tensor, x: Tensor, s0: Tensor | None, reset: Tensor | None) -> Tensor:
    a, x, s0, reset = all_dense(a, x, s0, reset)
    s: Tensor = empty_like(x)
    cuda_library().call("scan_forward", x, a, x, s0, reset, s, workspace_of("scan", x, *x.shape, False), *x.shape)
    return s


def scan_backward(
    ds: Tensor, s: Tensor, a: Tensor, s0: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    ds, a, s0, reset = all_dense(ds, a, s0, reset)
    da, dx = empty_like(a, a)
    ds0 = common.empty(a, a.shape[0], a.shape[2])
    workspace = workspace_of("scan", a, *a.shape, True)
    cuda_library().call("scan_backward", a, ds, s, a, s0, reset, da, dx, ds0, workspace, *a.shape)
    return da, dx, ds0


def recurrence(
    z: Tensor, u: Tensor, gamma: Tensor, w_g: Tensor, h0: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    z, gamma, w_g, h0, reset = all_dense(z, gamma, w_g, h0, reset)
    u, u_stride = rows_of(u)
    batch, time, width = z.shape
    heads, dim, _ = w_g.shape
    h, h_last = common.empty(z, batch, time, width), common.empty(z, batch, width)
    cuda_library().call(
        "recurrence_forward", z, z, u, TYPE_CODES[u.dtype], u_stride, None, gamma, w_g, h0, reset, h, h_last,
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
    dz, du, dgamma, dw_g = empty_like(z, u, gamma, w_g)
    dh0 = common.empty(z, z.shape[0], z.shape[2])
    workspace = workspace_of("recurrence_backward", z, *sizes)
    cuda_library().call(
        "recurrence_backward", z, dh, dh_last, h, z, u, TYPE_CODES[u.dtype], u_stride, None, gamma, w_g, h0, reset,
        dz, du, z.shape[2], None, dgamma, dw_g, dh0, workspace, *sizes,
    )  # fmt: skip
    return dz, du, dgamma, dw_g, dh0


def mdi(
    decay_logits: Tensor,
    decay_bias: Tensor,
    candidate: Tensor,
    gate_logits: Tensor | None,
    gate_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Returns decay and scaled candidate; :func:`mm_rec.ops.mdi` documents the shapes."""
    inputs, rows, width = _mdi_inputs(decay_logits, decay_bias, candidate, gate_logits, gate_bias)
    gamma, x = (common.empty(candidate, *candidate.shape, dtype=torch.float32) for _ in range(2))
    cuda_library().call("mdi_forward", x, *inputs, gamma, x, rows, width)
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
    ddecay, dcandidate, ddecay_bias = empty_like(candidate, candidate, decay_bias)
    if gate_logits is None or gate_bias is None:
        dgate, dgate_bias = common.empty(candidate, 0), common.empty(decay_bias, 0)
    else:
        dgate, dgate_bias = empty_like(gate_logits, gate_bias)
    workspace = workspace_of("mdi_backward", candidate, rows, width)
    cuda_library().call(
        "mdi_backward", candidate, dgamma, dx, *inputs, ddecay, ddecay_bias, dcandidate, width, dgate,
        dgate_bias, workspace, rows, width,
    )  # fmt: skip
    return ddecay, ddecay_bias, dcandidate, dgate, dgate_bias


def _mdi_inputs(
    decay_logits: Tensor,
    decay_bias: Tensor,
    candidate: Tensor,
    gate_logits: Tensor | None,
    gate_bias: Tensor | None,
) -> tuple[list[Any], int, int]:
    """Returns the arguments that the forward and the backward kernel of mdi share, then rows and columns."""
    gate = (None, 0) if gate_logits is None else rows_of(gate_logits)
    inputs = [
        *rows_of(decay_logits), decay_bias, *rows_of(candidate), *gate, gate_bias, TYPE_CODES[candidate.dtype],
    ]  # fmt: skip
    return inputs, *matrix_of(candidate)


KERNELS = (recurrence, recurrence_backward, scan, scan_backward, mdi, mdi_backward)
