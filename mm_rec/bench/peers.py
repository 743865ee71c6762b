"""The Transformers that MM-Rec is measured against."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ModernGPT", "gpt2_110m"]


def gpt2_110m(positions: int = 1024) -> Any:
    """GPT-2 of transformers with 12 blocks of 768, a vocabulary of 32,000 and so many positions; no dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    changes = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=32_000, n_positions=positions, use_cache=False, **changes))


class ModernGPT(nn.Module):
    """GPT with RMSNorm, rotary positions, norm of q and k, ReLU^2 and a tied head.

    Args:
        vocab_size, width, blocks, heads: as usual; the feed-forward part is four times as wide.
    """

    def __init__(self, vocab_size: int, width: int, blocks: int, heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.blocks = nn.ModuleList(_GPTBlock(width, heads) for _ in range(blocks))
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) token ids to (B, T, V) logits."""
        return F.linear(self.features(tokens), self.embedding.weight)

    def features(self, tokens: Tensor) -> Tensor:
        """(B, T) token ids to what the output head reads, (B, T, D)."""
        x = _norm(self.embedding(tokens))
        for block in self.blocks:
            x = block(x)
        return _norm(x)


class _GPTBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        heads = self.qkv(_norm(x)).view(batch, time, 3, self.heads, width // self.heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(_rotate(_norm(q)), _rotate(_norm(k)), v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, time, width))
        hidden: Tensor = self.down(F.relu(self.up(_norm(x))).square())
        return x + hidden


def _norm(x: Tensor) -> Tensor:
    normed: Tensor = F.rms_norm(x, (x.shape[-1],))
    return normed


def _rotate(x: Tensor) -> Tensor:
    """Rotary encoding of (B, H, T, d), base 10,000."""
    half = x.shape[-1] // 2
    frequency = 10_000.0 ** (-torch.arange(half, device=x.device) / half)
    angle = torch.arange(x.shape[-2], device=x.device)[:, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
