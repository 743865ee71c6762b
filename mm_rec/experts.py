"""Experts, each a stack of blocks, and the fusion of what they say."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mm_rec import ops
from mm_rec.blocks.mm_rec_block import MMRecBlock
from mm_rec.config import ModelConfig
from mm_rec.state import BlockState

__all__ = ["Expert", "Fusion"]


class Expert(nn.Module):
    """A stack of L blocks for one domain."""

    def __init__(self, config: ModelConfig, use_native: bool | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(MMRecBlock(config, index, use_native) for index in range(config.n_layers))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialise every block, in order."""
        for block in self.blocks:
            assert isinstance(block, MMRecBlock)
            block.reset_parameters(generator)

    def forward(
        self,
        x: Tensor,
        position: Tensor,
        reset: Tensor | None,
        state: list[BlockState],
        *,
        dtype: torch.dtype,
        gradient_checkpointing: bool = False,
    ) -> tuple[Tensor, list[BlockState]]:
        """Run the stack over T tokens.

        Args:
            x: (B, T, D) float32, the normed embeddings.
            position, reset: (B, T), as in :class:`MMRecBlock`.
            state: one per block.
            dtype: type of the activations.
            gradient_checkpointing: keep only the residual stream between blocks and run each block again
                in the backward pass: less memory, a third more time.

        Returns:
            (B, T, D) in ``dtype``, normed, and the states after the last token.
        """
        n = ops.rms_norm(x, dtype)
        after = []
        for block, before in zip(self.blocks, state, strict=True):
            if gradient_checkpointing and torch.is_grad_enabled():
                x, n, one = checkpoint(block, x, n, position, reset, before, use_reentrant=False)
            else:
                x, n, one = block(x, n, position, reset, before)
            after.append(one)
        return n, after


class Fusion(nn.Module):
    """Mix the experts' outputs per token: alpha = softmax(W_f [y_1; y_2; ...]), y = W_m sum_e alpha_e y_e.

    W_f starts at zero (plain average) and W_m at the identity, so that fusion begins as a mixture of the
    experts as they are.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        count = len(config.experts)
        self.gate = nn.Parameter(torch.empty(count, count * config.d_model))
        self.mix = nn.Parameter(torch.empty(config.d_model, config.d_model))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start as the plain average of the experts."""
        self.gate.zero_()
        nn.init.eye_(self.mix)

    def forward(self, outputs: list[Tensor]) -> Tensor:
        """Fuse the experts' outputs, each (B, T, D), into one (B, T, D) of the same type."""
        alpha = F.linear(torch.cat(outputs, dim=-1), self.gate).float().softmax(dim=-1).to(outputs[0].dtype)
        mixed = sum((alpha[..., i, None] * y for i, y in enumerate(outputs)), torch.zeros_like(outputs[0]))
        return ops.linear(mixed, self.mix)
