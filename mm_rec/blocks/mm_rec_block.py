"""One MM-Rec block: gated recurrence, multi-memory attention in every third, feed-forward."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm_rec import ops
from mm_rec.config import KEY_TAPS, ModelConfig
from mm_rec.state import BlockState, MemoryState

__all__ = ["MMRecBlock"]

DECAY_RANGE = (0.6, 0.999)


class MMRecBlock(nn.Module):
    """One block, from the residual stream and its norm to the next residual stream and its norm.

    A block begins with the norm of its input and so ends the one before it: the residual addition and the
    norm after it are one pass over memory, so both tensors travel together.

    Args:
        config: sizes.
        index: place in the stack, from 0; decides whether this is a memory block.
        use_native: force the native kernels (True) or the reference (False); None takes what is there.
    """

    def __init__(self, config: ModelConfig, index: int, use_native: bool | None = None) -> None:
        super().__init__()
        width, hidden, heads, d = config.d_model, config.d_ff, config.n_heads, config.head_dim
        self.config = config
        self.backend = None if use_native is None else "native" if use_native else "reference"
        self.is_memory_block = config.is_memory_block(index)
        # One wide product for candidate z, readout gate r, integration gate u and the decay's hidden layer.
        self.splits = [width, width, width, max(width // 4, 1)]
        self.in_proj = nn.Parameter(torch.empty(sum(self.splits), width))
        self.decay_proj = nn.Parameter(torch.empty(width, self.splits[3]))
        self.decay_bias = nn.Parameter(torch.empty(width))
        self.gate_bias = nn.Parameter(torch.empty(width))
        self.out_proj = nn.Parameter(torch.empty(width, width))
        if self.is_memory_block:
            self.w_g = nn.Parameter(torch.empty(heads, d, d))
            self.qkv_proj = nn.Parameter(torch.empty(3 * width, width))
            self.attention_out = nn.Parameter(torch.empty(width, width))
            self.key_taps = nn.Parameter(torch.empty(heads, d, KEY_TAPS))
            self.score_proj = nn.Parameter(torch.empty(heads, width))
            self.score_bias = nn.Parameter(torch.empty(heads))
        self.ffn_up = nn.Parameter(torch.empty(hidden, width))
        self.ffn_down = nn.Parameter(torch.empty(width, hidden))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialise all weights; the same generator state gives the same ones."""
        config = self.config
        residual_std = 0.02 / math.sqrt(2 * config.n_layers)
        for weight in (self.in_proj, self.decay_proj, self.ffn_up):
            weight.normal_(0, weight.shape[1] ** -0.5, generator=generator)
        for weight in (self.out_proj, self.ffn_down):
            weight.normal_(0, residual_std, generator=generator)
        # Every head gets the whole range of time scales.
        decay = torch.linspace(*DECAY_RANGE, config.d_model).view(config.head_dim, config.n_heads).t().reshape(-1)
        self.decay_bias.copy_(torch.logit(decay))
        self.gate_bias.zero_()
        if self.is_memory_block:
            self.w_g.normal_(0, 0.5 * config.head_dim**-0.5, generator=generator)
            self.qkv_proj.normal_(0, config.d_model**-0.5, generator=generator)
            self.attention_out.normal_(0, residual_std, generator=generator)
            self.key_taps.normal_(0, 0.3, generator=generator)
            self.key_taps[..., 0] += 1.0
            self.score_proj.normal_(0, 0.02, generator=generator)
            self.score_bias.zero_()

    def forward(
        self, x: Tensor, n: Tensor, position: Tensor, reset: Tensor | None, state: BlockState
    ) -> tuple[Tensor, Tensor, BlockState]:
        """Run the block over T tokens.

        Args:
            x: (B, T, D) float32, the residual stream.
            n: (B, T, D) in the activation type, rms_norm(x).
            position: (B, T) int64, place of each token in its document.
            reset: (B, T) bool, True at a document's first token; None for nowhere.
            state: what the block remembers of the tokens before.

        Returns:
            x and n after the block, and the state after the last token.
        """
        with ops.use_backend(self.backend):
            delta, h = self._recurrence(n, reset, state.h)
            x, n = ops.add_rms_norm(x, delta)
            memory = None
            if state.memory is not None:
                delta, memory = self._attention(n, position, state.memory)
                x, n = ops.add_rms_norm(x, delta)
            x, n = ops.add_rms_norm(x, ops.feed_forward(n, self.ffn_up, self.ffn_down))
        return x, n, BlockState(h, memory)

    def _recurrence(self, n: Tensor, reset: Tensor | None, h0: Tensor) -> tuple[Tensor, Tensor]:
        """Core recurrence and its gated readout; returns the contribution to x and the last h."""
        if not self.is_memory_block:
            return ops.linear_branch(
                n, self.in_proj, self.decay_proj, self.decay_bias, self.gate_bias, self.out_proj, h0, reset,
                self.config.n_heads,
            )  # fmt: skip
        y, h_last = ops.gated_recurrence(
            ops.linear(n, self.in_proj),
            self.decay_proj,
            self.decay_bias,
            self.gate_bias,
            self.config.n_heads,
            self.w_g,
            h0,
            reset,
        )
        return ops.linear(y, self.out_proj), h_last

    def _attention(self, n: Tensor, position: Tensor, memory: MemoryState) -> tuple[Tensor, MemoryState]:
        """Multi-memory attention; returns the contribution to x and the memories after the last token."""
        config = self.config
        batch, time, width = n.shape
        window = config.window
        q, own, v = ops.memory_context(ops.linear(n, self.qkv_proj), memory.own, memory.v)
        k = torch.cat([memory.k, ops.mixed_keys(own, self.key_taps, position)], dim=1)
        # At most 0: what is kept is read as much as its score says, and by that scores learn.
        score = F.logsigmoid(ops.linear(n, self.score_proj).float() + self.score_bias)
        score = torch.cat([memory.score, score], dim=1)
        out, *kept = ops.memory_attention(
            q, k, v, score, position, memory.kept_k, memory.kept_v, memory.kept_score, config.rotary_base
        )
        after = MemoryState(k[:, -window:], v[:, -window:], own[:, time:], score[:, -window:], *kept)
        return ops.linear(out.reshape(batch, time, width), self.attention_out), after
