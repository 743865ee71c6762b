"""The fusion of several experts, token by token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm_rec import ops
from mm_rec.config import ModelConfig

__all__ = ["Fusion"]


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

    @property
    def is_trained(self) -> bool:
        """Whether any step has trained it: W_f is zero before."""
        return bool(self.gate.any())

    def forward(self, outputs: list[Tensor]) -> Tensor:
        """Fuse the experts' outputs, each (B, T, D), into one (B, T, D) of the same type."""
        alpha = F.linear(torch.cat(outputs, dim=-1), self.gate).float().softmax(dim=-1).to(outputs[0].dtype)
        mixed = sum((alpha[..., i, None] * y for i, y in enumerate(outputs)), torch.zeros_like(outputs[0]))
        return ops.linear(mixed, self.mix)
