"""Whole branches of a block on the CPU: the products of :mod:`.matmul`, and between them kernels of the other modules.

The gradients of the slices of a product are written into the gradient of the whole product, and buffers are reused.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mm_rec.ops.cpu.matmul import mm
from mm_rec.ops.cpu.norm import relu_squared, relu_squared_backward_into
from mm_rec.ops.cpu.sequence import gated_scan, gated_scan_backward

__all__ = ["KERNELS"]


def _slices(product: Tensor, shape: torch.Size) -> tuple[Tensor, ...]:
    """The parts z, r, u (B, T, D) and hidden (B, T, K) of a product (B * T, 3 D + K)."""
    width = shape[2]
    return product.view(*shape[:2], -1).split_with_sizes([width, width, width, product.shape[1] - 3 * width], 2)


def linear_branch(
    n: Tensor,
    in_proj: Tensor,
    decay_proj: Tensor,
    decay_bias: Tensor,
    gate_bias: Tensor,
    out_proj: Tensor,
    h0: Tensor | None,
    reset: Tensor | None,
    heads: int,
) -> tuple[Tensor, ...]:
    product = mm(n.flatten(0, 1), in_proj.t())
    z, r, u, hidden = _slices(product, n.shape)
    activated = F.gelu(hidden).flatten(0, 1)
    decay_logits = mm(activated, decay_proj.t())
    h, y = gated_scan(z, u, r, decay_logits, decay_bias, gate_bias, h0, reset, heads)
    delta = mm(y.flatten(0, 1), out_proj.t())
    return delta.view(n.shape), h[:, -1].clone(), product, activated, decay_logits, h, y


def linear_branch_backward(
    ddelta: Tensor,
    dh_last: Tensor | None,
    product: Tensor,
    activated: Tensor,
    decay_logits: Tensor,
    h: Tensor,
    y: Tensor,
    n: Tensor,
    in_proj: Tensor,
    decay_proj: Tensor,
    decay_bias: Tensor,
    gate_bias: Tensor,
    out_proj: Tensor,
    h0: Tensor | None,
    reset: Tensor | None,
    heads: int,
) -> tuple[Tensor, ...]:
    rows, above = n.flatten(0, 1), ddelta.flatten(0, 1)
    dout_proj, dy = mm(above.t(), y.flatten(0, 1)), mm(above, out_proj)
    dproduct = torch.empty_like(product)
    (z, r, u, hidden), (dz, dr, du, dhidden) = _slices(product, n.shape), _slices(dproduct, n.shape)
    ddecay, ddecay_bias, dgate_bias, dh0 = gated_scan_backward(
        dy, dh_last, h, z, u, r, decay_logits, decay_bias, gate_bias, h0, reset, heads, dz, du, dr
    )
    ddecay = ddecay.flatten(0, 1)
    ddecay_proj, dactivated = mm(ddecay.t(), activated), mm(ddecay, decay_proj)
    torch.ops.aten.gelu_backward.grad_input(dactivated.view(hidden.shape), hidden, grad_input=dhidden)
    din_proj, dn = mm(dproduct.t(), rows), mm(dproduct, in_proj)
    return dn.view(n.shape), din_proj, ddecay_proj, ddecay_bias, dgate_bias, dout_proj, dh0


def feed_forward(n: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    hidden = mm(n.flatten(0, 1), up.t())
    squared = relu_squared(hidden)
    return mm(squared, down.t()).view(n.shape), hidden, squared


def feed_forward_backward(
    ddelta: Tensor, hidden: Tensor, squared: Tensor, n: Tensor, up: Tensor, down: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    above = ddelta.flatten(0, 1)
    ddown, dhidden = mm(above.t(), squared), mm(above, down)
    relu_squared_backward_into(dhidden, hidden, dhidden)
    return mm(dhidden, up).view(n.shape), mm(dhidden.t(), n.flatten(0, 1)), ddown


def linear(x: Tensor, weight: Tensor) -> Tensor:
    return mm(x.flatten(0, 1), weight.t()).view(*x.shape[:2], weight.shape[0])


KERNELS = (linear_branch, linear_branch_backward, feed_forward, feed_forward_backward)
