"""The recurrence of a block between its two wide products, as one fused op each for linear and nonlinear states.

The gradients of the parts of the first product are written into the gradient of the whole, so none is copied later.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mm_rec.ops.cuda import common
from mm_rec.ops.cuda.common import TYPE_CODES, all_dense, empty_like, rows_of, workspace_of
from mm_rec.ops.cuda.load_library import cuda_library
from mm_rec.ops.cuda.norm import readout
from mm_rec.ops.cuda.sequence import mdi

__all__ = ["KERNELS"]


def _decay(projected: Tensor, decay_proj: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the logits of the decay, and its hidden layer after gelu."""
    hidden = F.gelu(projected[..., 3 * decay_proj.shape[0] :])
    return F.linear(hidden, decay_proj), hidden


def _decay_backward(
    ddecay: Tensor, hidden: Tensor, projected: Tensor, decay_proj: Tensor, dprojected: Tensor
) -> Tensor:
    """Fill in the hidden layer's part of ``dprojected``, and return the gradient of ``decay_proj``."""
    part = slice(3 * decay_proj.shape[0], None)
    dhidden = ddecay @ decay_proj
    torch.ops.aten.gelu_backward.grad_input(dhidden, projected[..., part], grad_input=dprojected[..., part])
    return ddecay.flatten(0, 1).t() @ hidden.flatten(0, 1)


def gated_scan(
    projected: Tensor,
    decay_proj: Tensor,
    decay_bias: Tensor,
    gate_bias: Tensor,
    h0: Tensor | None,
    reset: Tensor | None,
    heads: int,
) -> tuple[Tensor, ...]:
    decay_bias, gate_bias, h0, reset = all_dense(decay_bias, gate_bias, h0, reset)
    projected, stride = rows_of(projected)
    batch, time, _ = projected.shape
    width = decay_proj.shape[0]
    decay, hidden = _decay(projected, decay_proj)
    y, h_last = empty_like(decay), common.empty(decay_bias, batch, width)
    starts = common.empty(decay_bias, batch, cuda_library().size("gated_scan_chunks", projected, time), width)
    workspace = workspace_of("gated_scan", projected, batch, time, width, False)
    cuda_library().call(
        "gated_scan_forward", projected, projected, stride, decay, TYPE_CODES[decay.dtype], decay_bias, gate_bias, h0,
        reset, y, h_last, starts, workspace, batch, time, width, width // heads,
    )  # fmt: skip
    return y, h_last, decay, hidden, starts


def gated_scan_backward(
    dy: Tensor,
    dh_last: Tensor | None,
    projected: Tensor,
    decay: Tensor,
    hidden: Tensor,
    starts: Tensor,
    decay_proj: Tensor,
    decay_bias: Tensor,
    gate_bias: Tensor,
    reset: Tensor | None,
    heads: int,
) -> tuple[Tensor, ...]:
    dy, dh_last, decay_bias, gate_bias, reset = all_dense(dy, dh_last, decay_bias, gate_bias, reset)
    projected, stride = rows_of(projected)
    batch, time, width = decay.shape
    dprojected, ddecay, ddecay_bias, dgate_bias = empty_like(projected, decay, decay_bias, gate_bias)
    dh0 = common.empty(decay_bias, batch, width)
    workspace = workspace_of("gated_scan", projected, batch, time, width, True)
    cuda_library().call(
        "gated_scan_backward", projected, dy, dh_last, starts, projected, stride, decay, TYPE_CODES[decay.dtype],
        decay_bias, gate_bias, reset, dprojected, dprojected.shape[2], ddecay, ddecay_bias, dgate_bias, dh0, workspace,
        batch, time, width, width // heads,
    )  # fmt: skip
    ddecay_proj = _decay_backward(ddecay, hidden, projected, decay_proj, dprojected)
    return dprojected, ddecay_proj, ddecay_bias, dgate_bias, dh0


def gated_loop(
    projected: Tensor,
    decay_proj: Tensor,
    decay_bias: Tensor,
    gate_bias: Tensor,
    w_g: Tensor,
    h0: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, ...]:
    decay_bias, gate_bias, w_g, h0, reset = all_dense(decay_bias, gate_bias, w_g, h0, reset)
    projected, _ = rows_of(projected)
    decay, hidden = _decay(projected, decay_proj)
    batch, time, width = decay.shape
    heads, dim, _ = w_g.shape
    z, r, u = projected[..., : 3 * width].split(width, dim=-1)
    u, u_stride = rows_of(u)
    gamma, x = mdi(decay, decay_bias, z, None, None)
    h, h_last = empty_like(x), common.empty(x, batch, width)
    cuda_library().call(
        "recurrence_forward", x, x, u, TYPE_CODES[u.dtype], u_stride, gate_bias, gamma, w_g, h0, reset, h, h_last,
        batch, time, heads, dim,
    )  # fmt: skip
    return readout(h, r, heads), h_last, decay, hidden, gamma, x, h


def gated_loop_backward(
    dy: Tensor,
    dh_last: Tensor | None,
    projected: Tensor,
    decay: Tensor,
    hidden: Tensor,
    gamma: Tensor,
    x: Tensor,
    h: Tensor,
    decay_proj: Tensor,
    decay_bias: Tensor,
    gate_bias: Tensor,
    w_g: Tensor,
    h0: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, ...]:
    dy, dh_last, decay_bias, gate_bias, w_g, h0, reset = all_dense(dy, dh_last, decay_bias, gate_bias, w_g, h0, reset)
    projected, _ = rows_of(projected)
    batch, time, width = h.shape
    heads, dim, _ = w_g.shape
    dprojected, ddecay_bias, dgate_bias, dw_g = empty_like(projected, decay_bias, gate_bias, w_g)
    z, r, u = projected[..., : 3 * width].split(width, dim=-1)
    dz, dr, du = dprojected[..., : 3 * width].split(width, dim=-1)
    stride, dtype = dprojected.shape[2], TYPE_CODES[projected.dtype]
    r, r_stride = rows_of(r)
    u, u_stride = rows_of(u)
    z, z_stride = rows_of(z)
    dh, dx, dgamma = empty_like(h, x, gamma)
    ddecay, dh0 = empty_like(decay), common.empty(h, batch, width)
    cuda_library().call("readout_backward", h, dy, h, r, dtype, r_stride, dh, dr, stride, batch * time, heads, dim)
    workspace = workspace_of("recurrence_backward", h, batch, time, heads, dim)
    cuda_library().call(
        "recurrence_backward", h, dh, dh_last, h, x, u, dtype, u_stride, gate_bias, gamma, w_g, h0, reset, dx, du,
        stride, dgate_bias, dgamma, dw_g, dh0, workspace, batch, time, heads, dim,
    )  # fmt: skip
    workspace = workspace_of("mdi_backward", h, batch * time, width)
    cuda_library().call(
        "mdi_backward", h, dgamma, dx, decay, width, decay_bias, z, z_stride, None, 0, None, dtype, ddecay, ddecay_bias,
        dz, stride, None, None, workspace, batch * time, width,
    )  # fmt: skip
    ddecay_proj = _decay_backward(ddecay, hidden, projected, decay_proj, dprojected)
    return dprojected, ddecay_proj, ddecay_bias, dgate_bias, dw_g, dh0


KERNELS = (gated_scan, gated_scan_backward, gated_loop, gated_loop_backward)
