"""Plain PyTorch definitions of every op of MM-Rec.

This file is the mathematics: slow, short, and differentiable by autograd alone. The native kernels
(CPU and CUDA) are compared with it, outputs and every gradient, and never the other way round.

Letters: B batch, T time, D width, H heads, d = D / H, W window, V vocabulary, N = B * T rows.

Every op computes in float32, or in float64 if an input is float64 (for ``gradcheck``); lower precision
inputs are widened first.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

GAMMA_MIN = 1e-6
GAMMA_MAX = 0.9999
NORM_EPS = 1e-6

POLAR_POLYNOMIALS = (
    (8.171302, -22.807432, 16.392801),
    (4.015953, -2.848658, 0.520336),
    (3.702807, -2.714017, 0.518551),
    (2.833347, -2.115947, 0.468084),
)
"""Coefficients a, b, c of the polynomials a x + b x^3 + c x^5 that :func:`orthogonalize` applies one after the other.

They are made as in Polar Express (Amsel et al., arXiv 2505.16932), of four steps for singular values from 0.002 to 1:
each is the best approximation of 1 over the range into which those before it take the values, with a cushion of 0.024,
and all but the last are divided by powers of 1.01 against rounding. Together they take that range into 0.65 ... 1.35,
which for an update is as good as 1, and multiply smaller values by 344 (the five steps of Newton and Schulz that Muon
is known with: by 485, into 0.7 ... 1.2).
"""
POLAR_SAFETY = 1.01

RUN = 64
"""Tokens from one place to the next at which :func:`retain` says what the slots hold."""

__all__ = [
    "GAMMA_MAX",
    "GAMMA_MIN",
    "NORM_EPS",
    "POLAR_POLYNOMIALS",
    "POLAR_SAFETY",
    "RUN",
    "add_rms_norm",
    "feed_forward",
    "gated_recurrence",
    "linear_branch",
    "linear_cross_entropy",
    "mdi",
    "memory_attention",
    "memory_context",
    "mixed_keys",
    "orthogonalize",
    "readout",
    "recurrence",
    "relu_squared",
    "retain",
    "rms_norm",
    "rotary_angles",
    "rotate",
    "scan",
    "split_projected",
]


def _wide(x: Tensor) -> Tensor:
    """Widen ``x`` to the type that the reference computes in: float32, or float64 if given float64."""
    return x if x.dtype == torch.float64 else x.float()


def mdi(
    decay_logits: Tensor,
    decay_bias: Tensor,
    candidate: Tensor,
    gate_logits: Tensor | None = None,
    gate_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Memory decay and integration: the coefficients of the core recurrence. Shapes as in :func:`mm_rec.ops.mdi`.

    gamma = clamp(sigmoid(decay_logits + decay_bias), 1e-6, 0.9999)
    x = sqrt(1 - gamma^2) * candidate * sigmoid(gate_logits + gate_bias)

    The scale keeps the state near unit variance for a white candidate. Without ``gate_logits`` the last
    factor is left out: the nonlinear :func:`recurrence` applies its own gate. Where the clamp holds,
    ``decay_logits`` get no gradient.
    """
    gamma = torch.sigmoid(_wide(decay_logits) + _wide(decay_bias)).clamp(GAMMA_MIN, GAMMA_MAX)
    x = torch.sqrt(1 - gamma * gamma) * _wide(candidate)
    if gate_logits is not None:
        if gate_bias is None:
            raise ValueError("gate_logits needs gate_bias")
        x = x * torch.sigmoid(_wide(gate_logits) + _wide(gate_bias))
    return gamma, x


def scan(a: Tensor, x: Tensor, s0: Tensor | None = None, reset: Tensor | None = None) -> Tensor:
    """Linear recurrence s_t = a_t * s_{t-1} + x_t, elementwise. Shapes as in :func:`mm_rec.ops.scan`.

    The pairs (a, x) compose associatively without logarithms, (a, x) then (a', x') is (a a', a' x + x'),
    so a kernel may cut time into pieces. Cumulative products are the case x = 0, s0 = 1.
    """
    a, x = _wide(a), _wide(x)
    if reset is not None:
        a = a.masked_fill(reset.unsqueeze(-1), 0.0)
    state = torch.zeros_like(x[:, 0]) if s0 is None else _wide(s0)
    states = []
    for t in range(x.shape[1]):
        state = a[:, t] * state + x[:, t]
        states.append(state)
    return torch.stack(states, dim=1)


def recurrence(
    z: Tensor,
    u: Tensor,
    gamma: Tensor,
    w_g: Tensor,
    h0: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The core recurrence, nonlinear in its state. Shapes as in :func:`mm_rec.ops.recurrence`.

    i_t = sigmoid(u_t + W_g h_{t-1});  h_t = i_t * z_t + gamma_t * h_{t-1}

    W_g is block-diagonal: head k maps its own slice of h through w_g[k], (W_g h)_i = sum_j w_g[k, i, j] h_j.
    """
    z, u, gamma, w_g = _wide(z), _wide(u), _wide(gamma), _wide(w_g)
    batch, time, width = z.shape
    heads, head_dim, _ = w_g.shape
    h = torch.zeros_like(z[:, 0]) if h0 is None else _wide(h0)
    states = []
    for t in range(time):
        if reset is not None:
            h = h.masked_fill(reset[:, t, None], 0.0)
        fed_back = torch.einsum("bkj,kij->bki", h.reshape(batch, heads, head_dim), w_g)
        gate = torch.sigmoid(u[:, t] + fed_back.reshape(batch, width))
        h = gate * z[:, t] + gamma[:, t] * h
        states.append(h)
    return torch.stack(states, dim=1), h.clone()


def rms_norm(x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """Root-mean-square norm over the last axis, without a gain: x / sqrt(mean(x^2) + 1e-6).

    Shapes as in :func:`mm_rec.ops.rms_norm`.
    """
    wide = _wide(x)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + NORM_EPS)
    return normed.to(out_dtype or x.dtype)


def add_rms_norm(x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Residual step and the norm that follows it: x' = x + delta, n = rms_norm(x').

    Shapes as in :func:`mm_rec.ops.add_rms_norm`.
    """
    total = x + delta.to(x.dtype)
    return total, rms_norm(total, delta.dtype)


def readout(h: Tensor, r: Tensor, heads: int) -> Tensor:
    """Gated readout of the recurrent state: RMSNorm per head of h, times silu(r).

    Shapes as in :func:`mm_rec.ops.readout`.
    """
    batch, time, width = h.shape
    normed = rms_norm(_wide(h).reshape(batch, time, heads, width // heads)).reshape(batch, time, width)
    return (normed * F.silu(_wide(r))).to(r.dtype)


def split_projected(projected: Tensor, decay_proj: Tensor) -> tuple[Tensor, ...]:
    """Returns the parts z, r, u (B, T, D each) and hidden (B, T, K) of (B, T, 3 D + K), with decay_proj (D, K)."""
    width, hidden = decay_proj.shape
    parts: tuple[Tensor, ...] = projected.split([width, width, width, hidden], dim=-1)
    return parts


def gated_recurrence(
    projected: Tensor,
    decay_proj: Tensor,
    decay_bias: Tensor,
    gate_bias: Tensor,
    heads: int,
    w_g: Tensor | None = None,
    h0: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A block's recurrence from its wide product to its readout. Shapes as in :func:`mm_rec.ops.gated_recurrence`.

    The parts of ``projected`` are candidate z, readout gate r, integration gate u and the decay's hidden layer;
    the decay logits are gelu(hidden) decay_proj^T. With ``w_g`` the time loop is :func:`recurrence`, which gates
    by u itself; without it :func:`mdi` applies the gate and the loop is :func:`scan`.
    """
    z, r, u, hidden = split_projected(projected, decay_proj)
    decay_logits = F.linear(F.gelu(hidden), decay_proj)
    if w_g is None:
        gamma, x = mdi(decay_logits, decay_bias, z, u, gate_bias)
        h = scan(gamma, x, h0, reset)
        return readout(h, r, heads), h[:, -1]
    gamma, x = mdi(decay_logits, decay_bias, z)
    h, h_last = recurrence(x, _wide(u) + _wide(gate_bias), gamma, w_g, h0, reset)
    return readout(h, r, heads), h_last


def relu_squared(x: Tensor) -> Tensor:
    """relu(x)^2, the feed-forward nonlinearity (Primer, arXiv 2109.08668). Any shape, same type out."""
    return F.relu(_wide(x)).square().to(x.dtype)


def feed_forward(n: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The feed-forward part of a block: down relu(up n)^2. Shapes as in :func:`mm_rec.ops.feed_forward`."""
    hidden = F.linear(_wide(n), _wide(up))
    return F.linear(relu_squared(hidden), _wide(down)).to(n.dtype)


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
) -> tuple[Tensor, Tensor]:
    """The recurrent part of a block that is linear in its state. Shapes as in :func:`mm_rec.ops.linear_branch`.

    One product gives candidate z, readout gate r, integration gate u and the decay's hidden layer; then
    :func:`gated_recurrence` and the product with ``out_proj``.
    """
    projected = F.linear(_wide(n), _wide(in_proj))
    y, h_last = gated_recurrence(projected, _wide(decay_proj), decay_bias, gate_bias, heads, None, h0, reset)
    return F.linear(y, _wide(out_proj)).to(n.dtype), h_last


def rotary_angles(index: Tensor, head_dim: int, base: float) -> Tensor:
    """Returns the angles (T, d / 2) float64 by which :func:`rotate` turns vectors at the positions ``index`` (T,)."""
    half = head_dim // 2
    frequency = base ** (-torch.arange(half, device=index.device, dtype=torch.float64) / half)
    return index.to(torch.float64)[:, None] * frequency


def rotate(x: Tensor, index: Tensor, base: float) -> Tensor:
    """Rotary position encoding (RoFormer, arXiv 2104.09864) of the two halves of the last axis.

    Args:
        x: (B, T, H, d), d even.
        index: (T,) integer positions; only differences of positions matter to q . k.
        base: the slowest wavelength is about 2 pi base.
    """
    half = x.shape[-1] // 2
    angle = rotary_angles(index, x.shape[-1], base)
    cos, sin = (f(angle).to(x.dtype)[None, :, None, :] for f in (torch.cos, torch.sin))
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def split_qkv(qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
    """Returns queries, keys and values, (B, T, H, d) each, of (B, T, 3 H d)."""
    batch, time, width = qkv.shape
    return qkv.view(batch, time, 3, heads, width // (3 * heads)).unbind(2)


def memory_context(qkv: Tensor, recent: Tensor, ring_v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a chunk, behind those of the tokens before that are still needed.

    The queries and the keys of the chunk are normed per head. Shapes as in :func:`mm_rec.ops.memory_context`.
    """
    q, k, v = split_qkv(qkv, ring_v.shape[2])
    return rms_norm(q), torch.cat([recent, rms_norm(k)], dim=1), torch.cat([ring_v, v], dim=1)


def attention_logits(q: Tensor, k: Tensor, position: Tensor, rotary_base: float) -> Tensor:
    """Returns (B, H, T, W + T): products of queries and keys under rotary encoding, -inf for what is not seen.

    A token sees the last W tokens of its own document, itself included.
    """
    time = q.shape[1]
    window = k.shape[1] - time
    context = torch.arange(window + time, device=q.device)
    here = context[window:]
    logits = torch.einsum("bthd,bchd->bhtc", rotate(q, here, rotary_base), rotate(k, context, rotary_base))
    visible = (context <= here[:, None]) & (context > here[:, None] - window)  # (T, W + T)
    visible = visible & (context >= (here - position)[..., None])  # (B, T, W + T)
    return logits.masked_fill(~visible[:, None], -math.inf)


def retain(score: Tensor, position: Tensor, kept_score: Tensor) -> tuple[Tensor, Tensor]:
    """Which tokens a head keeps when they leave the window: those of the highest scores, as many as it has slots.

    At a document's first token all slots become empty. A token that leaves the window takes an empty slot, else the
    slot of the lowest score if its own is higher; of equal ones the first. Shapes as in :func:`mm_rec.ops.retain`.
    """
    time, slots = position.shape[1], kept_score.shape[2]
    window = score.shape[1] - time
    index = torch.arange(slots, device=kept_score.device)
    kept, score = kept_score.clone(), score.transpose(1, 2)
    held = torch.where(kept > -math.inf, index, -1)
    taken, at_runs = [], [held]
    for t in range(time):
        begins = (position[:, t] == 0)[:, None, None]
        kept, held = kept.masked_fill(begins, -math.inf), held.masked_fill(begins, -1)
        lowest, slot = kept.min(dim=-1)
        comes = (score[:, :, t] > lowest) & (position[:, t] >= window)[:, None]
        here = comes[..., None] & (index == slot[..., None])
        kept = torch.where(here, score[:, :, t, None], kept)
        held = torch.where(here, slots + t, held)
        taken.append(torch.where(comes, slot, -1))
        if (t + 1) % RUN == 0 or t + 1 == time:
            at_runs.append(held)
    return torch.stack(taken, dim=-1).int(), torch.stack(at_runs, dim=2).int()


def retained(slot: Tensor, position: Tensor, kept_score: Tensor) -> Tensor:
    """Returns (B, H, T, K + T) bool: which pairs a head keeps at each token, of K slots and of tokens that leave."""
    time, slots = position.shape[1], kept_score.shape[2]
    index = torch.arange(slots, device=slot.device)
    held = torch.where(kept_score > -math.inf, index, -1)
    found = torch.zeros(*slot.shape, slots + time, dtype=torch.bool, device=slot.device)
    for t in range(time):
        held = held.masked_fill((position[:, t] == 0)[:, None, None], -1)
        held = torch.where(index == slot[:, :, t, None], slots + t, held)
        here = torch.zeros_like(found[:, :, t], dtype=torch.int64)
        found[:, :, t] = here.scatter_add_(2, held.clamp(min=0), (held >= 0).long()) > 0
    return found


def memory_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score: Tensor,
    position: Tensor,
    kept_k: Tensor,
    kept_v: Tensor,
    kept_score: Tensor,
    rotary_base: float = 1000.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One softmax over the window of recent tokens and the pairs that a head has kept of those before.

    In the window, logits are the products of queries and keys under rotary encoding, whose lengths the caller chooses;
    a kept pair has no place any more: its logit is the product plus its score, by which scores learn. Shapes as in
    :func:`mm_rec.ops.memory_attention`.
    """
    out_dtype, time, slots = q.dtype, q.shape[1], kept_k.shape[2]
    slot, held = retain(score, position, kept_score)
    pairs = candidate_pairs(k, v, score, kept_k, kept_v, kept_score, time)  # kept in the type that they have
    q, k, v, keys, values, scores = (_wide(x) for x in (q, k, v, *pairs))
    far = torch.einsum("bthd,bhjd->bhtj", q, keys) + scores[:, :, None]
    far = far.masked_fill(~retained(slot, position, kept_score), -math.inf)
    weight = torch.cat([attention_logits(q, k, position, rotary_base), far], dim=-1).softmax(dim=-1)
    near_weight, far_weight = weight.split([k.shape[1], slots + time], dim=-1)
    out = torch.einsum("bhtc,bchd->bthd", near_weight, v) + torch.einsum("bhtj,bhjd->bthd", far_weight, values)
    return out.to(out_dtype), *take_pairs(*pairs, held[:, :, -1])


def candidate_pairs(
    k: Tensor, v: Tensor, score: Tensor, kept_k: Tensor, kept_v: Tensor, kept_score: Tensor, time: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns what may be in a slot after T tokens: keys and values (B, H, K + T, d), and scores (B, H, K + T).

    First come the pairs in the slots before, then those of the tokens that leave the window meanwhile.
    """
    leaving = (x[:, :time].transpose(1, 2) for x in (k, v, score))
    keys, values, scores = (torch.cat(pair, dim=2) for pair in zip((kept_k, kept_v, kept_score), leaving, strict=True))
    return keys, values, scores


def take_pairs(keys: Tensor, values: Tensor, scores: Tensor, held: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns what is in the slots that hold ``held`` (B, H, K): rows of (B, H, N, d); 0 and -inf where nothing is."""
    index, empty = held.long().clamp(min=0), held < 0
    wide = index[..., None].expand(*index.shape, keys.shape[-1])
    k, v = (x.gather(2, wide).masked_fill(empty[..., None], 0.0) for x in (keys, values))
    return k, v, scores.gather(2, index).masked_fill(empty, -math.inf)


def mixed_keys(k: Tensor, taps: Tensor, position: Tensor) -> Tensor:
    """Keys under which values are found: the keys of a token and of those before it, weighted, of length 1.

    key_t = c_t / |c_t| with c_t = sum_j taps[..., j] * k_{t-j} over the tokens of the same document. So a value can be
    found by what stood before it. Shapes as in :func:`mm_rec.ops.mixed_keys`.
    """
    time, reach = position.shape[1], taps.shape[2]
    window = k.shape[1] - time
    out_dtype = k.dtype
    k, taps = _wide(k), _wide(taps)
    total = torch.zeros_like(k[:, window:])
    for j in range(reach):
        same_document = (position >= j)[..., None, None]
        total = total + taps[..., j] * k[:, window - j : window - j + time].masked_fill(~same_document, 0.0)
    return (total * torch.rsqrt(total.square().sum(-1, keepdim=True) + NORM_EPS)).to(out_dtype)


def linear_cross_entropy(
    y: Tensor, embedding: Tensor, targets: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Loss of the tied output head: logits y embedding^T, then weighted negative log-likelihood.

    Shapes as in :func:`mm_rec.ops.linear_cross_entropy`.
    """
    logits = _wide(y) @ _wide(embedding).t()
    nll = F.cross_entropy(logits, targets, reduction="none")
    if weight is None:
        return nll.mean(), nll.detach()
    return (_wide(weight) * nll).sum(), torch.where(weight != 0, nll.detach(), 0.0)


def orthogonalize(matrix: Tensor) -> Tensor:
    """The polar factor of a matrix, all of whose singular values are about 1; zeros where it is zero.

    The matrix, transposed if it is tall, is divided by its Frobenius norm (and a little more, since rounding must not
    take a singular value beyond 1), and :data:`POLAR_POLYNOMIALS` are applied to its singular values. Those below 0.002
    of the norm stay smaller.
    """
    x = _wide(matrix)
    x = x.t() if matrix.shape[0] > matrix.shape[1] else x
    tiny = torch.finfo(x.dtype).tiny
    x = x / x.abs().amax().clamp(min=tiny)  # first, since the square of an element may be too large or too small
    x = x / (x.norm().clamp(min=tiny) * POLAR_SAFETY)
    for a, b, c in POLAR_POLYNOMIALS:
        gram = x @ x.t()
        x = a * x + (b * gram + c * gram @ gram) @ x
    factor: Tensor = x.t() if matrix.shape[0] > matrix.shape[1] else x
    return factor.to(matrix.dtype)
