"""The long-term memory: its keys, and writing and reading it."""

from __future__ import annotations

from torch import Tensor

from mm_rec.ops.cuda import common
from mm_rec.ops.cuda.common import TYPE_CODES, aligned, all_dense, dense, empty_like, workspace_of
from mm_rec.ops.cuda.load_library import cuda_library

__all__ = ["KERNELS", "delta_keys", "delta_keys_backward", "delta_rule", "delta_rule_backward"]

_CHUNK = 64  # kChunk of mm_rec/cpp/cuda/delta_rule.cuh


def delta_keys(k: Tensor, taps: Tensor, position: Tensor) -> Tensor:
    """Returns the keys of the memory, (B, T, H, d)."""
    k, taps, position = all_dense(k, taps, position)
    batch, time, heads, dim, window = _sizes(k, position)
    key = common.empty(k, batch, time, heads, dim)
    cuda_library().call(
        "delta_keys_forward", k, k, TYPE_CODES[k.dtype], taps, position, key, batch, time, heads, dim, window,
        taps.shape[2],
    )  # fmt: skip
    return key


def delta_keys_backward(dkey: Tensor, k: Tensor, taps: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the gradients of k and taps."""
    dkey, k, taps, position = all_dense(dkey, k, taps, position)
    sizes = (*_sizes(k, position), taps.shape[2])
    dk, dtaps = empty_like(k, taps)
    workspace = workspace_of("delta_keys", k, *sizes)
    cuda_library().call(
        "delta_keys_backward", k, dkey, k, TYPE_CODES[k.dtype], taps, position, dk, dtaps, workspace, *sizes
    )
    return dk, dtaps


def delta_rule(
    q: Tensor, key: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, position: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns what is read, and the states: the one given, those after each chunk, and the last."""
    beta, log_decay, position, state = all_dense(beta, log_decay, position, state)
    batch, time, heads, dim = q.shape
    out = common.empty(q, *q.shape)
    states = common.empty(state, batch, -(-time // _CHUNK) + 1, heads, dim, dim)
    workspace = common.empty(q, cuda_library().size("delta_rule", q, batch, time, heads))
    cuda_library().call(
        "delta_rule_forward", q, *_rows(q), *_rows(key), *_rows(v), TYPE_CODES[q.dtype], beta, log_decay, position,
        state, out, states, workspace, batch, time, heads, dim,
    )  # fmt: skip
    return out, states


def delta_rule_backward(
    dout: Tensor | None,
    dlast: Tensor | None,
    states: Tensor,
    q: Tensor,
    key: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    position: Tensor,
) -> tuple[Tensor, ...]:
    """Returns the gradients of q, key, v, beta, log_decay and of the state given."""
    dout, dlast, states, beta, log_decay, position = all_dense(dout, dlast, states, beta, log_decay, position)
    gradients = empty_like(q, key, v, beta, log_decay, states[:, 0])
    workspace = common.empty(q, cuda_library().size("delta_rule_backward", q, *q.shape))
    cuda_library().call(
        "delta_rule_backward", q, dout, dlast, states, *_rows(q), *_rows(key), *_rows(v), TYPE_CODES[q.dtype], beta,
        log_decay, position, *gradients, workspace, *q.shape,
    )  # fmt: skip
    return tuple(gradients)


def _sizes(k: Tensor, position: Tensor) -> tuple[int, int, int, int, int]:
    """Returns B, T, H, d and W of the keys of a context; the kernels are written for d up to 256."""
    batch, time = position.shape
    if k.shape[3] > 256:
        raise ValueError(f"the CUDA kernels take heads of up to 256, got {k.shape[3]}")
    return batch, time, k.shape[2], k.shape[3], k.shape[1] - time


def _rows(x: Tensor) -> tuple[Tensor, int, int]:
    """Lay out ``x`` (B, T, H, d) with the heads of a token one after the other, copied only if needed.

    Returns:
        A tensor, and the distances of its sequences and of its tokens in elements.
    """
    _, _, heads, dim = x.shape
    regular = (dim == 1 or x.stride(3) == 1) and (heads == 1 or x.stride(2) == dim)
    if not regular or not aligned(x, x.stride(0), x.stride(1)):
        x = dense(x)
    return x, x.stride(0), x.stride(1)


KERNELS = (delta_keys, delta_keys_backward, delta_rule, delta_rule_backward)
