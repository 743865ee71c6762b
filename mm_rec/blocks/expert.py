"""One expert: a stack of blocks for one domain."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mm_rec import ops
from mm_rec.blocks.mm_rec_block import MMRecBlock
from mm_rec.config import ModelConfig
from mm_rec.state import BlockState

__all__ = ["Expert"]


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
                run = ops.keeps_backend(block)
                x, n, one = checkpoint(run, x, n, position, reset, before, use_reentrant=False)
            else:
                x, n, one = block(x, n, position, reset, before)
            after.append(one)
        return n, after
